"""One run at a time in a folder, as long as its process lives; several in a shared one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from clora.errors import CloraError
from clora.locks import LOCK, locked, shared

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are killed as on POSIX")
HOLD = "import sys, time, pathlib; from clora.locks import *\nwith {lock}: print('held', flush=True); time.sleep(60)"

LOCKED = (
    "import sys, pathlib; from clora.locks import *\nwith locked(pathlib.Path(sys.argv[1])): print('held', flush=True)"
)


@pytest.fixture
def start():
    """Starts processes that hold a lock."""
    started = []

    def run(lock):
        process = subprocess.Popen([sys.executable, "-c", HOLD.format(lock=lock)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_learns_who_holds_the_folder_and_a_dead_one_holds_nothing(start, tmp_path):
    folder = tmp_path / "out"
    process = start(f"locked(pathlib.Path({str(folder)!r}))")
    with pytest.raises(CloraError, match=rf"in use by another run \(process {process.pid} on .*name another output"):
        with locked(folder):
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(folder):
        assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (folder / LOCK).exists(), "the folder is made to be shared"


def test_an_error_leaves_no_folder(tmp_path):
    def fail():
        with locked(tmp_path / "a" / "b"):
            raise CloraError("wrong layers")

    with pytest.raises(CloraError, match="wrong layers"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_locks_all_the_same(tmp_path):
    """Whatever is written next says that it is full."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    done = subprocess.run([sys.executable, "-c", limit + LOCKED, tmp_path / "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(CloraError, match="cannot be written"), locked(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "kept"


def test_a_shared_folder_is_cleaned_only_by_a_lone_run(start, tmp_path):
    cleaned = []
    with shared(tmp_path, cleaned.append):
        assert cleaned == [tmp_path]
        start(f"shared(pathlib.Path({str(tmp_path)!r}), lambda folder: sys.exit('cleaned'))")
    with shared(tmp_path, cleaned.append):
        assert cleaned == [tmp_path], "another run writes there"
