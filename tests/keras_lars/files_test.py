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


def test_link_under_the_name_of_the_new_file_is_not_followed(tmp_path):
    path, other = tmp_path / "table.csv", tmp_path / "other"
    other.write_text("mine")
    (tmp_path / ".part-table.csv").symlink_to(other)
    with written_atomically(path) as part:
        part.write_text("new")
    assert (path.read_text(), other.read_text()) == ("new", "mine")
    assert not path.is_symlink()


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
