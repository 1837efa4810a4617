"""Files are written whole or not at all, and an output folder is checked before the work starts."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

import clora
from clora.config.reading import read_tree
from clora.errors import CloraError
from clora.files import check_writable, read_text, remove_orphans, replacing, user_path, write_atomic


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
        (
            OSError(28, "No space left on device"),
            CloraError,
            "No space left on device; make room there; the same command",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            CloraError,
            "a.txt cannot be written: No space left on device; make room there; the same command",
        ),
        (OSError(27, "File too large"), CloraError, "File too large; allow files of that size there"),
        (SafetensorError("no such type"), SafetensorError, "no such type"),
        (OSError(13, "Permission denied"), CloraError, "Permission denied; choose another output folder"),
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


@pytest.mark.skipif(os.name == "nt", reason="links and rights of POSIX")
def test_no_link_redirects_a_file_and_its_rights_are_the_umasks(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for name in (f".a.txt.{os.getpid()}.tmp", ".a.txt.tmp", "a.txt"):
        (tmp_path / name).symlink_to(victim)
    seen = []
    for _ in range(2):
        with replacing(tmp_path / "a.txt") as file:
            seen.append(file.parent)
            assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700, "nobody else may put a link there"
            file.write_text("new")
    assert seen[0] != seen[1]
    assert victim.read_text() == "kept"
    assert not (tmp_path / "a.txt").is_symlink()
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "b.txt", "b")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "b.txt").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *names: steps.append("name") or replace(*names))
    write_atomic(tmp_path / "a", "a")
    assert steps == ["file", "name", "folder"]


def test_only_orphans_of_the_named_files_are_removed(tmp_path):
    (tmp_path / ".a.txt.x_1b2c3d.tmp").mkdir()
    (tmp_path / ".a.txt.x_1b2c3d.tmp" / "a.txt").write_text("half")
    (tmp_path / ".a.txt.4321.tmp").write_text("of an earlier version")
    kept = {".b.txt.x_1b2c3d.tmp", "a.txt", ".a.txt.tmp", "a.txt.4321.tmp"}
    for name in kept:
        (tmp_path / name).write_text("kept")
    remove_orphans(tmp_path, r"a\.txt")
    remove_orphans(tmp_path / "missing", ".*")
    assert {file.name for file in tmp_path.iterdir()} == kept


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


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "\ud800"])
def test_a_path_that_no_system_has(name):
    for read in (clora.load_collection, clora.inspect, read_tree):
        with pytest.raises(CloraError, match="expected a path, found"):
            read(name)


def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in ("/dev/zero", tmp_path / "pipe.safetensors"):
        with pytest.raises(CloraError, match="found a device or a pipe"):
            read_text(Path(path), "a text file")
    with pytest.raises(CloraError, match="found a device or a pipe"):
        clora.inspect(tmp_path / "pipe.safetensors")
