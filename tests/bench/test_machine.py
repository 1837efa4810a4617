"""The sources and the machine that a figure belongs to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bench.machine
from bench.machine import NOT_SOURCES, ROOT, commit, describe, measure_roof, revision, slug, tree


@pytest.fixture
def checkout(tmp_path):
    """A folder with one source of each kind, and files that are none."""
    for file in (
        "bench/cases.py",
        "bench/report.py",
        "csrc_triton/op.py",
        "clora/ops.py",
        "clora/bank/slots.py",
        "README.md",
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("0\n")
    (tmp_path / "bench" / "results").mkdir()
    return tmp_path


def git(folder, *command):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    return subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "file", ["csrc_triton/op.py", "csrc_triton/new.py", "clora/ops.py", "clora/bank/slots.py", "csrc_triton/tiles.json"]
)
def test_a_change_of_a_source_is_another_revision(checkout, file):
    before = revision(checkout)
    (checkout / file).write_text("1\n")
    assert revision(checkout) != before


@pytest.mark.parametrize(
    "file",
    ["bench/results/a.json", "bench/report.py", "README.md", "bench/README.md", "csrc_triton/multi_lora/designs.json"],
)
def test_what_no_figure_depends_on_leaves_the_revision(checkout, file):
    before = revision(checkout)
    (checkout / file).parent.mkdir(exist_ok=True)
    (checkout / file).write_text("1\n")
    assert revision(checkout) == before


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("clora/training/trainer.py", True),
        ("tests/training/test_trainer.py", True),
        ("csrc_triton/multi_lora/designs.json", True),
        ("bench/gpu.py", True),
        ("bench/results/a.json", False),
        ("README.md", False),
    ],
)
def test_a_tree_is_all_that_a_task_can_depend_on(checkout, file, changes):
    before = tree(checkout)
    (checkout / file).parent.mkdir(exist_ok=True, parents=True)
    (checkout / file).write_text("1\n")
    assert (tree(checkout) != before) == changes


def test_only_what_a_measurement_loads_is_a_source_of_it():
    program = "import sys, bench.worker; print(*[name for name in sys.modules if name.startswith('bench.')])"
    names = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    loaded = {ROOT / f"{name.replace('.', '/')}.py" for name in names.split()}
    files = {file for file in (ROOT / "bench").rglob("*.py") if file.name != "__init__.py"}
    excluded = {file for file in files for path in NOT_SOURCES if file.is_relative_to(ROOT / path)}
    pytests = {file for file in files if file.name == "conftest.py" or file.name.startswith("bench_")}
    assert files - excluded - pytests == loaded


def test_commit(checkout, monkeypatch):
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert commit(checkout) == "unknown"
    (checkout / "GIT_COMMIT").write_text("from the file\n")
    assert commit(checkout) == "from the file"
    monkeypatch.setenv("GIT_COMMIT", "from the variable")
    assert commit(checkout) == "from the variable"
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "change")
    assert git(checkout, "rev-parse", "HEAD").startswith(commit(checkout))
    (checkout / "csrc_triton" / "op.py").write_text("1\n")
    assert commit(checkout).endswith("+")


def test_folder_of_a_gpu():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"


def test_machine_and_roof(monkeypatch):
    """On the CPU with a small product and copy, and a clock that always reads 2 ms."""
    monkeypatch.setattr(bench.machine, "ROOF_SIZE", 64)
    monkeypatch.setattr(bench.machine, "COPY_BYTES", 1000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(bench.machine, "_output", lambda command, folder: None)
    called = []
    roof = measure_roof(torch.device("cpu"), lambda call: (called.append(call()) or 2.0, 0.1))
    assert len(called) == 2 * 20
    assert roof["tflop_per_s"] == pytest.approx(2 * 64**3 / 2e-3 / 1e12)
    assert roof["gb_per_s"] == pytest.approx(2000 / 2e-3 / 1e9)
    found = describe(torch.device("cpu"))
    assert found["revision"] == revision()
    assert (found["gpu"], found["capability"], found["driver"]) == ("Some GPU", [9, 0], "unknown")
    assert found["torch"] == torch.__version__
    assert found["peft"][0].isdigit()
