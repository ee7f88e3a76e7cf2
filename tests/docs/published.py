"""Published efficiencies of jobs with many ranks, and what the plan has there.

docs/plan.md has the sources.
"""

import dataclasses
import functools

from keras.applications import VGG16
from keras.applications import InceptionV3
from keras.applications import ResNet50

from horovod_recipes.planning import overlap
from horovod_recipes.planning.estimate import BACKWARD_SHARE
from horovod_recipes.planning.hardware import HARDWARE
from horovod_recipes.planning.hardware import allreduce_seconds

GBIT = 1e9 / 8
UBER = dataclasses.replace(
    HARDWARE["p100"], devices_per_node=4, network_bytes_per_second=25 * GBIT
)
V100 = HARDWARE["v100"]

# Each row: description, efficiency, hardware, ranks, ranks of the baseline,
# seconds of the baseline's step, network.
EFFICIENCIES = [
    (
        "ResNet-50, 352 P100, 50 Gbit/s, Caffe2 [1]",
        1 / 1.12,
        *(HARDWARE["p100"], 352, 8, 16 * 60 / 5004, ResNet50),
    ),
    (
        "Inception V3, 512 P100, 25 Gbit/s, Horovod [2]",
        0.90,
        *(UBER, 512, 1, 64 / 142, InceptionV3),
    ),
    (
        "VGG-16, 512 P100, 25 Gbit/s, Horovod [2]",
        0.68,
        *(UBER, 512, 1, 64 / 154, VGG16),
    ),
    (
        "ResNet-50, 32 V100, 100 Gbit/s, Horovod [3]",
        9514.64 / 362.44 / 32,
        *(V100, 32, 1, 128 / 362.44, ResNet50),
    ),
    (
        "ResNet-50, 32 V100, 100 Gbit/s, OneFlow [3]",
        11711.18 / 384.85 / 32,
        *(V100, 32, 1, 128 / 384.85, ResNet50),
    ),
    (
        "ResNet-50, 8 A100 of one node, TF32, Horovod [4]",
        7.70 / 8,
        *(HARDWARE["a100"], 8, 1, 256 / 909, ResNet50),
    ),
    (
        "ResNet-50, 8 A100 of one node, mixed, Horovod [4]",
        7.32 / 8,
        *(HARDWARE["a100"], 8, 1, 256 / 2375, ResNet50),
    ),
    (
        "ResNet-50, 64 H100 with 50 images each, Horovod [5]",
        294_700 / 56_060 / 8,
        *(HARDWARE["h100"], 64, 8, 50 * 8 / 56_060, ResNet50),
    ),
]


def efficiencies():
    """Returns `[what, published, not overlapped, overlapped]`, in %."""
    rows = []
    for (
        what,
        published,
        hardware,
        ranks,
        base,
        seconds,
        network,
    ) in EFFICIENCIES:
        row = [what, 100 * published]
        for share in (0, BACKWARD_SHARE):
            exposed = functools.partial(
                _exposed_seconds, hardware, network, share * seconds
            )
            added = exposed(ranks) - exposed(base)
            row.append(100 * seconds / (seconds + added))
        rows.append(row)
    return rows


def _exposed_seconds(hardware, network, backward_seconds, ranks):
    allreduce = functools.partial(allreduce_seconds, hardware, ranks)
    gradients = gradients_of(network)
    return overlap.allreduce_times(gradients, backward_seconds, allreduce)[1]


@functools.cache
def gradients_of(network):
    """Returns the gradients of a network of `keras.applications`."""
    return overlap.gradients_of(network(weights=None))
