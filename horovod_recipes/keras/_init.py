"""`hvd.init`, with a default for Open MPI."""

import os

import horovod.tensorflow


def init(*args, **kwargs):
    """Initializes Horovod, with the arguments of `horovod.tensorflow.init`.

    Where Open MPI connects the ranks, one that waits for others then leaves its
    core to the threads that train, where it would else spin. With
    `OMPI_MCA_mpi_yield_when_idle=0` in the environment it spins.
    """
    # MPI reads it when it starts, which Horovod has it do now.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    horovod.tensorflow.init(*args, **kwargs)
