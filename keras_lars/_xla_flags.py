"""The flag that lets XLA:CPU write two outputs in one pass over their inputs.

The update of LARS has two outputs: weights and velocity. Without the flag, XLA
reads their inputs once for each. XLA reads its flags once in a process.
"""

import functools
import logging
import os

OPTION = "xla_cpu_use_multi_output_fusion"
# Earlier versions were not tried. XLA ignores options that it does not know.
FIRST_TENSORFLOW = (2, 21)


def allow_two_outputs():
    """Sets the flag for this process, unless XLA has options already."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_backend_extra_options" not in flags and _is_known():
        flag = f"--xla_backend_extra_options={OPTION}"
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


@functools.cache
def writes_two_outputs():
    """Whether the flag is set, and TensorFlow knows it."""
    if OPTION not in os.environ.get("XLA_FLAGS", ""):
        return False
    if not _is_known():
        logging.getLogger("keras_lars").warning(
            "XLA_FLAGS has %s, which needs TensorFlow %d.%d. LARS updates "
            "without it.",
            OPTION,
            *FIRST_TENSORFLOW,
        )
        return False
    return True


def _is_known():
    import tensorflow as tf

    version = tuple(int(part) for part in tf.__version__.split(".")[:2])
    return version >= FIRST_TENSORFLOW
