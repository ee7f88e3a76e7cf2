"""init: starts Horovod, with a default for Open MPI."""

import os

import horovod.tensorflow


def init(*args, **kwargs):
    """Initializes Horovod, with the arguments of `horovod.tensorflow.init`.

    Under Open MPI, a rank that waits for the others leaves its core to the
    threads that train. To make it spin instead, set
    `OMPI_MCA_mpi_yield_when_idle=0` in the environment.
    """
    # Horovod starts MPI in `init`, and MPI reads the variable then.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    horovod.tensorflow.init(*args, **kwargs)
