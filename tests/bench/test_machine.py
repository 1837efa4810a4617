"""Which revision a figure belongs to."""

from __future__ import annotations

import subprocess

import pytest
import torch

import bench.machine
from bench.machine import describe, revision, slug, sources_hash


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one source of each kind, committed."""
    for file in ("bench/cases.py", "bench/report.py", "csrc_triton/op.py", "clora/ops.py", "README.md"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("0\n")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(folder, *command):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    return subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "change")


def test_a_clean_checkout_is_its_last_commit_of_the_sources(checkout):
    before = revision(checkout)
    assert git(checkout, "rev-parse", "HEAD").startswith(before)
    (checkout / "bench" / "results").mkdir()
    for file in ("bench/results/a.json", "bench/report.py", "README.md", "bench/README.md"):
        (checkout / file).write_text("1\n")
    assert revision(checkout) == before
    commit(checkout)
    assert revision(checkout) == before
    (checkout / "csrc_triton" / "op.py").write_text("1\n")
    commit(checkout)
    assert revision(checkout) != before


@pytest.mark.parametrize(
    "file", ["csrc_triton/op.py", "csrc_triton/new.py", "clora/ops.py", "csrc_triton/designs.json"]
)
def test_an_uncommitted_change_of_a_source_is_told_by_its_hash(checkout, file):
    before = revision(checkout)
    (checkout / file).write_text("1\n")
    assert revision(checkout) == f"{before}+{sources_hash(checkout)}"
    first = revision(checkout)
    (checkout / file).write_text("2\n")
    assert revision(checkout) != first


def test_without_git_the_sources_alone_tell(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "cases.py").write_text("0\n")
    assert revision(tmp_path) == f"unknown+{sources_hash(tmp_path)}"


def test_folder_of_a_gpu():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"


def test_machine_and_roof(monkeypatch):
    """On the CPU with a small product and copy, and a clock that always says 2 ms."""
    monkeypatch.setattr(bench.machine, "ROOF_SIZE", 64)
    monkeypatch.setattr(bench.machine, "COPY_BYTES", 1000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(bench.machine, "_output", lambda command, folder: None)
    called = []
    found = describe(torch.device("cpu"), lambda call: (called.append(call()) or 2.0, 0.1))
    assert len(called) == 2 * 20
    assert (found["gpu"], found["capability"], found["driver"]) == ("Some GPU", [9, 0], "unknown")
    assert found["torch"] == torch.__version__
    assert found["peft"][0].isdigit()
    assert found["roof"]["tflop_per_s"] == pytest.approx(2 * 64**3 / 2e-3 / 1e12)
    assert found["roof"]["gb_per_s"] == pytest.approx(2000 / 2e-3 / 1e9)
