"""The paths of variables, by which LARS names and excludes them."""

import re


def path_of(variable):
    """Returns the path of a Keras variable, or the name of a `tf.Variable`."""
    if hasattr(variable, "path"):
        return variable.path
    return variable.name.removesuffix(":0")


def is_excluded(variable, patterns):
    """Whether a pattern is in the path or, for None, the rank is at most 1."""
    if patterns is None:
        return len(variable.shape) <= 1
    return any(re.search(pattern, path_of(variable)) for pattern in patterns)


def unique_paths(variables):
    """Returns all paths; a repeated one gets the first free `_1`, `_2` ..."""
    paths = [path_of(variable) for variable in variables]
    taken, unique = set(paths), {}
    for path in paths:
        free, number = path, 0
        while free in unique or (number and free in taken):
            number += 1
            free = f"{path}_{number}"
        unique[free] = True
    return list(unique)
