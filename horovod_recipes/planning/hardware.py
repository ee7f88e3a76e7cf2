"""What devices and networks can do, and how long an allreduce takes on them.

Figures are those of data sheets and of published or measured runs, each with
its source; none of the GPUs has been measured with this code. docs/plan.md has
the check of the allreduce model against published figures.
"""

import dataclasses
import math

from horovod_recipes.errors import JobError

# Forward and backward pass of an image of 224 x 224: three times the forward
# pass, since the backward pass has two products for each of its one.
RESNET50_V1 = 3 * 7_715_946_496
RESNET50_V1_5 = 3 * 8_178_368_512


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device, the node it is in, and the network between nodes.

    Attributes:
        description: String, for a person.
        flops: Dict `{precision: (peak, achieved)}` in FLOP/s, of a device;
            what is achieved is that of training ResNet-50.
        speed_source: String, where the achieved speed is from.
        memory: Integer, bytes of a device.
        memory_bandwidth: Float, bytes a second of a device.
        devices_per_node: Integer.
        node_bandwidth: Float, bytes a second that a device sends to the
            others of its node.
        node_latency: Float, seconds of a message inside the node.
        network_bandwidth: Float, bytes a second that a node sends.
        network_latency: Float, seconds of a message between nodes.
        tree_latency: Float, seconds of a level of the trees that NCCL may take
            in place of a ring; None where there is no NCCL.
    """

    description: str
    flops: dict
    speed_source: str
    memory: float
    memory_bandwidth: float
    devices_per_node: int
    node_bandwidth: float
    node_latency: float
    network_bandwidth: float
    network_latency: float
    tree_latency: float | None


# As NCCL's own model has them for its "Simple" protocol: `hwLat` in
# https://github.com/NVIDIA/nccl/blob/01afd20/src/graph/tuning.cc
NVLINK_LATENCY = 3.4e-6
NETWORK_LATENCY = 9.6e-6
TREE_LATENCY = 50e-6

HARDWARE = {
    # NVIDIA's white paper WP-08019 on the P100. Node and network: Goyal et al.,
    # arXiv 1706.02677, section 4.3, Big Basin.
    "p100": Hardware(
        description="Tesla P100 SXM2 16 GB, 8 a node, 50 Gbit/s Ethernet",
        flops={"float32": (10.6e12, 219 * RESNET50_V1)},
        speed_source=(
            "219 images/s of ResNet-50 v1, batch 64, TensorFlow on a DGX-1, "
            "docs_src/performance/benchmarks.md of TensorFlow 1"
        ),
        memory=16e9,
        memory_bandwidth=732e9,
        devices_per_node=8,
        node_bandwidth=80e9,
        node_latency=NVLINK_LATENCY,
        network_bandwidth=50e9 / 8,
        network_latency=NETWORK_LATENCY,
        tree_latency=TREE_LATENCY,
    ),
    # NVIDIA's V100 data sheet. Node and network: those of DLPerf,
    # https://github.com/Oneflow-Inc/DLPerf, dlperf_benchmark_test_report_v1.md.
    "v100": Hardware(
        description="V100 SXM2 16 GB, 8 a node, one EDR InfiniBand of 100 Gb/s",
        flops={
            "float32": (15.7e12, 362.44 * RESNET50_V1_5),
            "mixed_float16": (125e12, 982.4 * RESNET50_V1_5),
        },
        speed_source=(
            "362 images/s of ResNet-50 v1.5, batch 128, and 982 in mixed "
            "precision, batch 256, TensorFlow 1.15 without XLA, DLPerf"
        ),
        memory=16e9,
        memory_bandwidth=900e9,
        devices_per_node=8,
        node_bandwidth=150e9,
        node_latency=NVLINK_LATENCY,
        network_bandwidth=100e9 / 8,
        network_latency=NETWORK_LATENCY,
        tree_latency=TREE_LATENCY,
    ),
    # NVIDIA's A100 data sheet; TensorFlow computes float32 in TF32. Network: a
    # DGX A100's, as in NVIDIA/systems/dgxa100_n8_ngc20.06_mxnet.json of
    # https://github.com/mlcommons/training_results_v0.7.
    "a100": Hardware(
        description="A100 SXM4 40 GB, 8 a node, 8 HDR InfiniBand of 200 Gb/s",
        flops={
            "float32": (156e12, 909 * RESNET50_V1_5),
            "mixed_bfloat16": (312e12, 2375 * RESNET50_V1_5),
            "mixed_float16": (312e12, 2375 * RESNET50_V1_5),
        },
        speed_source=(
            "909 images/s of ResNet-50 v1.5 in TF32 and 2375 in mixed "
            "precision, batch 256, TensorFlow 1.15 with XLA, NVIDIA "
            "DeepLearningExamples"
        ),
        memory=40e9,
        memory_bandwidth=1555e9,
        devices_per_node=8,
        node_bandwidth=300e9,
        node_latency=NVLINK_LATENCY,
        network_bandwidth=8 * 200e9 / 8,
        network_latency=NETWORK_LATENCY,
        tree_latency=TREE_LATENCY,
    ),
    # NVIDIA's H100 data sheet, without sparsity. Network: a DGX H100's, as in
    # NVIDIA/systems/dgxh100_n64_ngc23.04_mxnet.json of
    # https://github.com/mlcommons/training_results_v3.0.
    "h100": Hardware(
        description="H100 SXM5 80 GB, 8 a node, 8 NDR InfiniBand of 400 Gb/s",
        flops={
            "mixed_bfloat16": (989.4e12, 56060 / 8 * RESNET50_V1_5),
            "mixed_float16": (989.4e12, 56060 / 8 * RESNET50_V1_5),
        },
        speed_source=(
            "56060 images/s of ResNet-50 v1.5 on 8 GPUs, batch 400 each, "
            "NVIDIA's own MXNet in MLPerf 3.0: out of reach for TensorFlow"
        ),
        memory=80e9,
        memory_bandwidth=3350e9,
        devices_per_node=8,
        node_bandwidth=450e9,
        node_latency=NVLINK_LATENCY,
        network_bandwidth=8 * 400e9 / 8,
        network_latency=NETWORK_LATENCY,
        tree_latency=TREE_LATENCY,
    ),
    # docs/results/allreduce_model.json, "2 ranks": one core of two, and the
    # ring that was fitted; the memory is half of the machine's.
    "cpu": Hardware(
        description="one core of an AMD EPYC, Gloo over loopback",
        flops={
            "float32": (
                94.739 * 1e9,
                2.123 * RESNET50_V1_5,
            )
        },
        speed_source=(
            "2.123 images/s of ResNet-50 v1.5, batch 8, one thread, "
            "docs/results/allreduce_model.json"
        ),
        memory=12e9,
        memory_bandwidth=38.283 * 1e9,
        devices_per_node=1,
        node_bandwidth=1.017 * 1e9,
        node_latency=1032.4 * 1e-6,
        network_bandwidth=1.017 * 1e9,
        network_latency=1032.4 * 1e-6,
        tree_latency=None,
    ),
}


def find_hardware(name, precision):
    """Returns an entry of `HARDWARE` that knows a precision.

    Raises:
        JobError: If there is none.
    """
    if name not in HARDWARE:
        raise JobError(
            f"unknown hardware {name!r}; choose one of {', '.join(HARDWARE)}"
        )
    precisions = HARDWARE[name].flops
    if precision not in precisions:
        raise JobError(
            f"no speed is known of {name} in {precision}; plan with "
            f"--config.precision={' or '.join(precisions)}, or other hardware"
        )
    return HARDWARE[name]


def ring_seconds(devices, message_bytes, bandwidth, latency):
    """Returns the time of an allreduce in a ring.

    Each device sends a share of the message to the next, `devices - 1` times
    to add it up and as often to hand the sums around.

    Args:
        devices: Integer.
        message_bytes: Integer.
        bandwidth: Float, bytes a second that each device sends.
        latency: Float, seconds of each sending.
    """
    sendings = 2 * (devices - 1)
    return sendings * (message_bytes / devices / bandwidth + latency)


def tree_seconds(nodes, message_bytes, bandwidth, latency):
    """Returns the time of an allreduce up and down a pair of binary trees.

    Each node sends the message once towards the roots and once back, as in
    NCCL's model (`tuning.cc`, above), in as many steps as the trees are high.

    Args:
        nodes: Integer.
        message_bytes: Integer.
        bandwidth: Float, bytes a second that each node sends.
        latency: Float, seconds of each level.
    """
    return 2 * (message_bytes / bandwidth + math.log2(nodes) * latency)


def allreduce_seconds(hardware, ranks, message_bytes):
    """Returns the time of one allreduce over all ranks, one a device.

    Inside a node the devices add up and gather in a ring. Between, each one
    sums its share of the message with those in its place on the other nodes,
    in rings, or trees where that is faster, that share the node's network.

    Args:
        hardware: A `Hardware`.
        ranks: Integer.
        message_bytes: Integer, of the gradients of one rank.
    """
    local = min(ranks, hardware.devices_per_node)
    nodes = math.ceil(ranks / local)
    inside = ring_seconds(
        local, message_bytes, hardware.node_bandwidth, hardware.node_latency
    )
    bandwidth = hardware.network_bandwidth
    between = ring_seconds(
        nodes, message_bytes, bandwidth, hardware.network_latency
    )
    if hardware.tree_latency is not None:
        between = min(
            between,
            tree_seconds(
                nodes, message_bytes, bandwidth, hardware.tree_latency
            ),
        )
    return inside + between
