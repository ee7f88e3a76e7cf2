"""Writing files so that a reader, or a kill, never meets half of one."""

import contextlib
import os


@contextlib.contextmanager
def written_atomically(path):
    """Yields a path beside `path` to write to, and renames it when done.

    The path yielded has the suffix of `path`. If the block fails, `path`
    stays as it was and what was written is removed.
    """
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
