"""Writing a file so that nobody ever reads half of it."""

import contextlib
import os


@contextlib.contextmanager
def written_atomically(path):
    """Yields a path beside `path` to write to, and renames it at the end.

    The yielded path has the suffix of `path`. If the block fails, `path` stays
    unchanged and the new file is removed.
    """
    part = path.with_name(f".part-{path.name}")
    # A link in a stranger's folder would lead to a file outside of it.
    part.unlink(missing_ok=True)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
