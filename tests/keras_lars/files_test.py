"""A file is either the old one or the whole new one."""

import pytest

from keras_lars._files import written_atomically


def test_new_file_replaces_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with written_atomically(path) as part:
        part.write_text("new")
        assert part.suffix == ".csv"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail():
        with written_atomically(path) as part:
            part.write_text("half")
            raise OSError

    with pytest.raises(OSError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
