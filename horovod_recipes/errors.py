"""The error that ends a job with one clear line, and the wording of others."""


class JobError(Exception):
    """What is wrong and how to fix it, in one line."""


def one_line(error):
    """Returns the message of an error without its line breaks."""
    return " ".join(str(error).split())


def root_cause(error):
    """Returns the line of a TensorFlow error that a person wants to see.

    The message of an error in a graph first lists places in the code. The cause
    follows. Marks in double brackets of the nodes on its way close it.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("[[")]
    return lines[-1] if lines else "no message"
