"""Divides gradients into groups, which travel one after the other."""

# How many groups there are by default. They travel during the backward pass.
# NVIDIA's ResNet-50 for MXNet has 16 too. A group has a cost of its own.
MAX_DEFAULT_GROUPS = 16
MIN_DEFAULT_GROUP_BYTES = 2**20


def default_number(sizes):
    """Returns the number of groups for gradients of these bytes."""
    number = sum(sizes) // MIN_DEFAULT_GROUP_BYTES
    return max(1, min(MAX_DEFAULT_GROUPS, number))


def split_by_bytes(sizes, number):
    """Returns at most `number` groups of about equal bytes.

    The backward pass computes the last gradients first. So the first group has
    the last ones.

    Args:
        sizes: List of integers, the bytes of each gradient.
        number: Integer.

    Returns:
        A list of lists of places in `sizes`.
    """
    total = sum(sizes)
    groups, begin = {}, 0
    for i in reversed(range(len(sizes))):
        # A group takes the gradients that begin in its part of the bytes.
        part = begin * number // max(total, 1)
        groups.setdefault(part, []).insert(0, i)
        begin += sizes[i]
    return list(groups.values())
