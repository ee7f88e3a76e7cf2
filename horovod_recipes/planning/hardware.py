"""The speeds of devices and networks, and the time of an allreduce on them.

Each figure comes from a data sheet or a published run, whose source is given.
Only the figures of `cpu` were measured with this code. docs/plan.md compares
the allreduce model with published figures.
"""

import dataclasses
import math

from horovod_recipes.errors import JobError

# FLOPs to train on one image of 224 x 224 pixels.
# The backward pass takes twice the FLOPs of the forward pass.
RESNET50_V1_FLOPS = 3 * 7_715_946_496
RESNET50_V1_5_FLOPS = 3 * 8_178_368_512


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device, its node, and the network between nodes.

    Attributes:
        description: String, for people to read.
        flops_per_second: Dict `{precision: (peak, achieved)}` of a device, in
            FLOP/s. The second value is the speed of training ResNet-50.
        speed_source: String, the source of the achieved speeds.
        memory_bytes: Float, the memory of a device.
        memory_bytes_per_second: Float, the memory bandwidth of a device.
        devices_per_node: Integer.
        node_bytes_per_second: Float, the bandwidth with which a device sends
            to the other devices of its node.
        node_latency_seconds: Float, the latency of a message within a node.
        network_bytes_per_second: Float, the bandwidth with which a node sends.
        network_latency_seconds: Float, the latency of a message between nodes.
        tree_latency_seconds: Float, the latency of one level of NCCL's trees,
            which can replace a ring; None on hardware without NCCL.
    """

    description: str
    flops_per_second: dict
    speed_source: str
    memory_bytes: float
    memory_bytes_per_second: float
    devices_per_node: int
    node_bytes_per_second: float
    node_latency_seconds: float
    network_bytes_per_second: float
    network_latency_seconds: float
    tree_latency_seconds: float | None


# Latencies in NCCL's own model, for its "Simple" protocol: `hwLat` in
# https://github.com/NVIDIA/nccl/blob/01afd20/src/graph/tuning.cc
NVLINK_LATENCY_SECONDS = 3.4e-6
NETWORK_LATENCY_SECONDS = 9.6e-6
TREE_LATENCY_SECONDS = 50e-6

HARDWARE = {
    # Device: NVIDIA's white paper WP-08019 on the P100.
    # Node and network: Goyal et al., arXiv 1706.02677, section 4.3.
    "p100": Hardware(
        description="Tesla P100 SXM2 16 GB, 8 per node, 50 Gb/s Ethernet",
        flops_per_second={"float32": (10.6e12, 219 * RESNET50_V1_FLOPS)},
        speed_source=(
            "219 images/s for ResNet-50 v1, batch 64, TensorFlow on a DGX-1, "
            "in TensorFlow 1's docs_src/performance/benchmarks.md"
        ),
        memory_bytes=16e9,
        memory_bytes_per_second=732e9,
        devices_per_node=8,
        node_bytes_per_second=80e9,
        node_latency_seconds=NVLINK_LATENCY_SECONDS,
        network_bytes_per_second=50e9 / 8,
        network_latency_seconds=NETWORK_LATENCY_SECONDS,
        tree_latency_seconds=TREE_LATENCY_SECONDS,
    ),
    # Device: NVIDIA's V100 data sheet. Node and network: DLPerf's,
    # https://github.com/Oneflow-Inc/DLPerf, dlperf_benchmark_test_report_v1.md.
    "v100": Hardware(
        description="V100 SXM2 16 GB, 8 per node, 100 Gb/s EDR InfiniBand",
        flops_per_second={
            "float32": (15.7e12, 362.44 * RESNET50_V1_5_FLOPS),
            "mixed_float16": (125e12, 982.4 * RESNET50_V1_5_FLOPS),
        },
        speed_source=(
            "362 images/s for ResNet-50 v1.5, batch 128, and 982 in mixed "
            "precision, batch 256, TensorFlow 1.15 without XLA, in DLPerf"
        ),
        memory_bytes=16e9,
        memory_bytes_per_second=900e9,
        devices_per_node=8,
        node_bytes_per_second=150e9,
        node_latency_seconds=NVLINK_LATENCY_SECONDS,
        network_bytes_per_second=100e9 / 8,
        network_latency_seconds=NETWORK_LATENCY_SECONDS,
        tree_latency_seconds=TREE_LATENCY_SECONDS,
    ),
    # Device: NVIDIA's A100 data sheet. TensorFlow computes float32 in TF32.
    # Network: that of a DGX A100, in
    # NVIDIA/systems/dgxa100_n8_ngc20.06_mxnet.json of
    # https://github.com/mlcommons/training_results_v0.7.
    "a100": Hardware(
        description="A100 SXM4 40 GB, 8 per node, 8 x 200 Gb/s HDR InfiniBand",
        flops_per_second={
            "float32": (156e12, 909 * RESNET50_V1_5_FLOPS),
            "mixed_bfloat16": (312e12, 2375 * RESNET50_V1_5_FLOPS),
            "mixed_float16": (312e12, 2375 * RESNET50_V1_5_FLOPS),
        },
        speed_source=(
            "909 images/s for ResNet-50 v1.5 in TF32 and 2375 in mixed "
            "precision, batch 256, TensorFlow 1.15 with XLA, in NVIDIA "
            "DeepLearningExamples"
        ),
        memory_bytes=40e9,
        memory_bytes_per_second=1555e9,
        devices_per_node=8,
        node_bytes_per_second=300e9,
        node_latency_seconds=NVLINK_LATENCY_SECONDS,
        network_bytes_per_second=8 * 200e9 / 8,
        network_latency_seconds=NETWORK_LATENCY_SECONDS,
        tree_latency_seconds=TREE_LATENCY_SECONDS,
    ),
    # Device: NVIDIA's H100 data sheet, without sparsity.
    # Network: that of a DGX H100, in
    # NVIDIA/systems/dgxh100_n64_ngc23.04_mxnet.json of
    # https://github.com/mlcommons/training_results_v3.0.
    "h100": Hardware(
        description="H100 SXM5 80 GB, 8 per node, 8 x 400 Gb/s NDR InfiniBand",
        flops_per_second={
            "mixed_bfloat16": (989.4e12, 56060 / 8 * RESNET50_V1_5_FLOPS),
            "mixed_float16": (989.4e12, 56060 / 8 * RESNET50_V1_5_FLOPS),
        },
        speed_source=(
            "56060 images/s for ResNet-50 v1.5 on 8 GPUs, batch 400 per GPU, "
            "NVIDIA's MXNet in MLPerf 3.0, which TensorFlow does not reach"
        ),
        memory_bytes=80e9,
        memory_bytes_per_second=3350e9,
        devices_per_node=8,
        node_bytes_per_second=450e9,
        node_latency_seconds=NVLINK_LATENCY_SECONDS,
        network_bytes_per_second=8 * 400e9 / 8,
        network_latency_seconds=NETWORK_LATENCY_SECONDS,
        tree_latency_seconds=TREE_LATENCY_SECONDS,
    ),
    # Speeds and fitted ring: "2 ranks" in docs/results/allreduce_model.json.
    # Memory: half of that machine's, which has two cores.
    "cpu": Hardware(
        description="one core of an AMD EPYC, Gloo over loopback",
        flops_per_second={
            "float32": (94.739 * 1e9, 2.123 * RESNET50_V1_5_FLOPS)
        },
        speed_source=(
            "2.123 images/s for ResNet-50 v1.5, batch 8, one thread, in "
            "docs/results/allreduce_model.json"
        ),
        memory_bytes=12e9,
        memory_bytes_per_second=38.283 * 1e9,
        devices_per_node=1,
        node_bytes_per_second=1.017 * 1e9,
        node_latency_seconds=1032.4 * 1e-6,
        network_bytes_per_second=1.017 * 1e9,
        network_latency_seconds=1032.4 * 1e-6,
        tree_latency_seconds=None,
    ),
}


def find_hardware(name, precision):
    """Returns the entry `HARDWARE[name]`.

    Raises:
        JobError: If there is no such entry, or if it has no speed for
            `precision`.
    """
    if name not in HARDWARE:
        raise JobError(
            f"unknown hardware {name!r}; choose one of {', '.join(HARDWARE)}"
        )
    precisions = HARDWARE[name].flops_per_second
    if precision not in precisions:
        raise JobError(
            f"the speed of {name} in {precision} is unknown; use "
            f"--config.precision={' or '.join(precisions)}, or other hardware"
        )
    return HARDWARE[name]


def allreduce_seconds(hardware, ranks, message_bytes):
    """Returns the time of one allreduce over all ranks, one per device.

    The devices of a node first reduce-scatter the message in a ring, and last
    allgather it. In between, each device allreduces its share with one device
    of every other node. These allreduces share the network of the node. They
    use rings, or trees if these are faster.

    Args:
        hardware: A `Hardware`.
        ranks: Integer.
        message_bytes: Integer, the bytes of one rank's gradients.
    """
    local = min(ranks, hardware.devices_per_node)
    nodes = math.ceil(ranks / local)
    within_nodes = ring_seconds(
        local,
        message_bytes,
        hardware.node_bytes_per_second,
        hardware.node_latency_seconds,
    )
    between_nodes = ring_seconds(
        nodes,
        message_bytes,
        hardware.network_bytes_per_second,
        hardware.network_latency_seconds,
    )
    if hardware.tree_latency_seconds is not None:
        trees = tree_seconds(
            nodes,
            message_bytes,
            hardware.network_bytes_per_second,
            hardware.tree_latency_seconds,
        )
        between_nodes = min(between_nodes, trees)
    return within_nodes + between_nodes


def ring_seconds(devices, message_bytes, bytes_per_second, latency_seconds):
    """Returns the time of an allreduce in a ring.

    Each device sends a share of the message to the next one: `devices - 1`
    times to reduce, and `devices - 1` times to distribute the sums.

    Args:
        devices: Integer.
        message_bytes: Integer.
        bytes_per_second: Float, the bandwidth with which each device sends.
        latency_seconds: Float, the latency of sending one share.
    """
    share_seconds = message_bytes / devices / bytes_per_second
    return 2 * (devices - 1) * (share_seconds + latency_seconds)


def tree_seconds(nodes, message_bytes, bytes_per_second, latency_seconds):
    """Returns the time of an allreduce up and down a pair of binary trees.

    This is NCCL's model (`tuning.cc`, above). Each node sends the message once
    towards the roots and once back. Each way takes one latency per level.

    Args:
        nodes: Integer.
        message_bytes: Integer.
        bytes_per_second: Float, the bandwidth with which each node sends.
        latency_seconds: Float, the latency of one level.
    """
    levels = math.log2(nodes)
    return 2 * (message_bytes / bytes_per_second + levels * latency_seconds)
