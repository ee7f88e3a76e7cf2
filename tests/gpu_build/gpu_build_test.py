"""The installed GPU build loads and reduces, also without a GPU."""

import pathlib
import re
import subprocess
import sys

import horovod.tensorflow as hvd
import pytest

from horovod_recipes import install_horovod


def output_of(*command):
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=300
    ).stdout


@pytest.fixture(scope="module")
def library():
    (path,) = pathlib.Path(hvd.__file__).parent.glob("mpi_lib.*.so")
    return path


def test_has_cuda_and_nccl():
    assert hvd.cuda_built()
    # NCCL 2.27.7: major * 10000 + minor * 100 + patch.
    assert hvd.nccl_built() >= 22707
    options = install_horovod.build_options(gpu=True)
    assert install_horovod.why_not_current("2.21.0", options) is None


def symbols(which, path):
    lines = output_of("nm", "-D", which, str(path)).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def test_no_undefined_symbol(library):
    """`ldd -r` finds all symbols except those that TensorFlow exports."""
    undefined = {
        line.split()[2].rstrip(",")
        for line in output_of("ldd", "-r", str(library)).splitlines()
        if line.startswith("undefined symbol")
    }
    folder = pathlib.Path(hvd.tf.__file__).parent
    exported = set().union(
        *(
            symbols("--defined-only", path)
            for path in folder.glob("libtensorflow_*.so.2")
        )
    )
    assert undefined
    assert undefined - exported == set()
    # TensorFlow provides CUDA's runtime, which it loads on demand.
    assert {"cudaEventRecord", "__cudaRegisterFatBinary"} <= undefined


def test_stream_function_is_defined_inside(library):
    """TensorFlow 2.21 does not export AsGpuStreamValue."""
    names = symbols("--undefined-only", library)
    assert not [name for name in names if "AsGpuStreamValue" in name]
    assert "ncclAllReduce" in names


def test_needs_nccl_of_the_environment_and_no_driver(library):
    dynamic = output_of("readelf", "-d", str(library))
    libraries = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libnccl.so.2" in libraries
    assert not [n for n in libraries if n.startswith(("libcuda.", "libcudart"))]
    assert "[$ORIGIN/../../nvidia/nccl/lib]" in dynamic


def test_two_ranks_reduce_cpu_tensors():
    script = (
        "import horovod.tensorflow as hvd, tensorflow as tf; hvd.init(); "
        "x = tf.fill([1000], float(hvd.rank() + 1)); "
        "total = hvd.allreduce(x, op=hvd.Sum).numpy(); "
        "both = hvd.grouped_allreduce([x, 2 * x], op=hvd.Average); "
        "assert (total == 3).all() and total.shape == (1000,); "
        "assert [float(b[0]) for b in both] == [1.5, 3]; "
        "print('rank', hvd.rank(), 'of', hvd.size())"
    )
    launcher = str(pathlib.Path(sys.executable).with_name("horovodrun"))
    printed = output_of(
        *(launcher, "--gloo", "-np", "2", sys.executable, "-c", script)
    )
    assert sorted(re.findall(r"rank \d of \d", printed)) == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]
