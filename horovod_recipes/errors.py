"""The error that ends a job with one line, and short forms of other errors."""

import re


class JobError(Exception):
    """An error whose one-line message says what is wrong and how to fix it."""


def missing_package(error):
    """Returns how to fix a `ModuleNotFoundError` of a command, in one line."""
    return (
        f"the package {error.name} is not installed here; activate the "
        "environment that has it (. .venv/bin/activate), or run: pip install "
        "'.[recipes]'"
    )


def one_line(error):
    """Returns the message of an error without its line breaks."""
    return " ".join(str(error).split())


def root_cause(error):
    """Returns the part of a TensorFlow error that names its cause, in one line.

    The message of a graph error lists places in the code before the cause, and
    nodes in double brackets and hints after it. Without a graph, the cause
    stands between the names of a function and an operation.
    """
    before_nodes = str(error).partition("[[")[0].strip()
    cause = one_line(before_nodes.rpartition("\n\n")[2])
    cause = re.sub(r"^{{.*?}} | \[Op:\w+\] name:.*$", "", cause)
    return cause or "no message"
