"""The paths of variables, by which LARS names and excludes them."""

import collections
import re


def is_excluded(variable, patterns):
    """Whether a pattern is in the path or, for None, the rank is at most 1."""
    if patterns is None:
        return len(variable.shape) <= 1
    return any(re.search(pattern, variable.path) for pattern in patterns)


def unique_paths(variables):
    """Returns all paths; `_1`, `_2` ... follow a path that came before."""
    seen = collections.Counter()
    unique = []
    for path in [variable.path for variable in variables]:
        unique.append(f"{path}_{seen[path]}" if seen[path] else path)
        seen[path] += 1
    return unique
