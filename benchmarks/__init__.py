"""Benchmarks: speed/ has one command per question, study/ measures accuracy.

`python -m benchmarks.report` runs the main ones and writes a page of results.
"""

from horovod_recipes._quiet import without_banner

# Here, because every benchmark imports this package first.
with without_banner():
    import keras  # noqa: F401
