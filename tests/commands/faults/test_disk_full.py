"""A disk that is full, and files that may not grow: one sentence, and the same command goes on once there is room."""

from __future__ import annotations

import os
import subprocess

import pytest
from helpers.fault_runs import Fault
from helpers.written import Written, assert_all_whole

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")


def assert_refused(found, reason):
    code, said = found
    assert code == 1
    assert "Traceback" not in said
    assert reason in said.split("error: ")[1]
    assert "the same command goes on with what is kept" in said


def test_checkpoints_that_may_not_grow(job, whole):
    """They are the largest files."""
    found = job.run(Fault(largest=100_000))
    assert_refused(found, "00000002.safetensors cannot be written: File too large; allow files of that size there")
    assert_all_whole(job.output)
    assert not list(job.folder.rglob("*.tmp"))
    assert job.run()[0] == 0
    assert Written.read(job.output) == whole[0]


def test_a_collection_that_may_not_grow(job, whole):
    assert job.run(Fault(whole[1]["exporting"][0], (9,)))[0] == -9
    assert_refused(job.run(Fault(largest=20_000)), "pytorch_lora_weights.safetensors cannot be written: File too large")
    assert_all_whole(job.output)
    assert job.run()[0] == 0
    assert Written.read(job.output) == whole[0]


@pytest.fixture
def small_disk(job):
    """Makes the job's folder a file system of a few kB; returns what changes its size."""

    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", job.folder], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield lambda kB: subprocess.run(["mount", "-o", f"remount,size={kB}k", job.folder], check=True)
    subprocess.run(["umount", "-l", job.folder], check=True)


@pytest.mark.parametrize("kB", [300, *(pytest.param(kB, marks=pytest.mark.slow) for kB in (4, 60))])
def test_a_full_disk(job, whole, small_disk, kB):
    small_disk(kB)
    assert_refused(job.run(), "cannot be written: No space left on device; make room there")
    assert_all_whole(job.output)
    assert not list(job.folder.rglob("*.tmp"))
    small_disk(4000)
    assert job.run()[0] == 0
    assert Written.read(job.output) == whole[0]


def test_no_room_for_temporary_files(job):
    code, said = job.run(Fault(largest=3000))
    assert code == 1
    assert "Traceback" not in said
    assert "set TMPDIR to another folder" in said
