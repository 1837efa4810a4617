"""Files are written whole or not at all, and an output folder is checked before the work starts."""

from __future__ import annotations

import pytest

from clora.errors import CloraError
from clora.files import check_writable, replacing, user_path, write_atomic


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_atomic(path, "first")
    with replacing(path) as file:
        file.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(28, "No space left on device"), CloraError, "No space left on device; choose another output folder"),
        (KeyError("other"), KeyError, "other"),
    ],
)
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, raised, expected, message):
    path = tmp_path / "a.txt"
    write_atomic(path, b"first")

    def interrupted():
        with replacing(path) as file:
            file.write_text("half")
            raise raised

    with pytest.raises(expected, match=message):
        interrupted()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CloraError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "a.png", b"")


def test_check_writable(tmp_path):
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    assert check_writable(tmp_path) == tmp_path
    (tmp_path / "file").write_text("x")
    with pytest.raises(CloraError, match="is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(CloraError, match="cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "sub")


def test_paths_of_users():
    assert user_path("~/a").is_absolute()
    with pytest.raises(CloraError, match="zero byte"):
        user_path("a\0b")
    with pytest.raises(CloraError, match="write the path in full"):
        user_path("~nobody_of_this_name/a")
