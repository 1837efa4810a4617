"""The one command, with the processes that it starts replaced."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bench.run
from bench import records
from bench.machine import ROOT
from bench.report import NAME, TESTS
from bench.run import TEST_OPTIONS, run_cases, run_tests
from bench.timing import countdown
from bench.worker import DEVICE_LOST

FILE = "tests/csrc_triton/test_a_triton.py"


class Processes:
    """Stands in for subprocess.run: each call takes the next of `results`, a code, an output or an error."""

    def __init__(self, *results):
        self.results, self.commands, self.limits = list(results), [], []

    def __call__(self, command, timeout=None, **options):
        self.commands.append(command)
        self.limits.append(timeout)
        result = self.results.pop(0)
        if isinstance(result, BaseException):
            raise result
        code, output = result if isinstance(result, tuple) else (result, "")
        return subprocess.CompletedProcess(command, code, output, "")


@pytest.fixture
def one_file(monkeypatch):
    """A repository with one test file."""
    monkeypatch.setattr(bench.run, "_test_files", lambda: [FILE])


def left(seconds=100.0):
    return lambda: seconds


def test_without_a_gpu_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.run.main(["--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "no CUDA device found" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_file")
@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((1, 0), 1), ((0, 1), 1)])
def test_the_whole_command(codes, expected, tmp_path, monkeypatch):
    processes = Processes((codes[0], "== 5 passed in 1s ==\n"), codes[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU 1")
    monkeypatch.setattr(run_tests, "__defaults__", (processes,))
    monkeypatch.setattr(run_cases, "__defaults__", ("*", processes))
    assert bench.run.main(["--out", str(tmp_path), "--budget-s", "100", "--only", "loss-*"]) == expected
    tests, cases = processes.commands
    assert tests[1:] == ["-m", "pytest", "-q", *TEST_OPTIONS, FILE]
    assert cases[1:6] == ["-m", "bench.worker", str(tmp_path / "some-gpu-1"), "--only", "loss-*"]
    assert 45 < processes.limits[0] < 50
    assert 90 < float(cases[-1]) < 100
    assert FILE in (tmp_path / "some-gpu-1" / NAME).read_text()


@pytest.mark.usefixtures("one_file")
def test_a_file_that_passed_is_passed_over_and_another_is_not(tmp_path):
    failed = (1, "FAILED tests/a.py::b - no\n1 failed in 1s\n")
    processes = Processes(failed, (0, "2 passed in 1s\n"), (0, "2 passed in 1s\n"))
    assert not run_tests(tmp_path, "r1", left(), processes)
    entry = records.read(tmp_path / TESTS)["files"][FILE]
    assert (entry["outcome"], entry["summary"]) == ("failed", "1 failed in 1s")
    assert entry["failures"] == ["FAILED tests/a.py::b - no"]
    for revision, runs in (("r1", 2), ("r1", 2), ("r2", 3)):
        assert run_tests(tmp_path, revision, left(), processes)
        assert len(processes.commands) == runs


@pytest.mark.usefixtures("one_file")
def test_a_file_that_the_budget_stopped_is_no_failure_and_waits_for_more_time(tmp_path):
    processes = Processes(subprocess.TimeoutExpired("pytest", 50, b"....\n"), 0)
    for seconds, outcome in ((100, "stopped"), (101, "stopped"), (200, "passed")):
        assert run_tests(tmp_path, "r1", left(seconds), processes)
        assert records.read(tmp_path / TESTS)["files"][FILE]["outcome"] == outcome
    assert processes.limits == [50, 100]


def test_tests_get_their_share_of_the_time_together(tmp_path, monkeypatch):
    now = [0.0]

    def run(command, **options):
        now[0] += 30
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bench.run, "_test_files", lambda: ["a", "b", "c"])
    assert run_tests(tmp_path, "r1", countdown(100, lambda: now[0]), run)
    assert list(records.read(tmp_path / TESTS)["files"]) == ["a", "b"]


def test_tests_of_kernels_come_first_and_those_that_need_no_gpu_last():
    files = bench.run._test_files()
    order = [file.endswith("_triton.py") - file.endswith("_compiled.py") for file in files]
    assert order == sorted(order, reverse=True)
    assert set(order) == {1, 0, -1}
    assert files.index("tests/csrc_triton/test_training.py") < files.index(
        "tests/csrc_triton/test_multi_lora_compiled.py"
    )


@pytest.mark.parametrize(
    ("results", "expected"),
    [((0,), True), ((DEVICE_LOST, -11, 0), True), ((subprocess.TimeoutExpired("w", 5),), True), ((1,), False)],
)
def test_a_process_that_a_provider_broke_is_followed_by_another(results, expected, tmp_path):
    processes = Processes(*results)
    assert run_cases(tmp_path, left(), run=processes) == expected
    assert processes.results == []


def test_without_time_nothing_is_started(tmp_path):
    assert run_cases(tmp_path, left(0.0), run=Processes())


def test_slow_tests_are_not_left_out_where_no_plugin_is_installed(tmp_path, monkeypatch):
    """The command that a bare GPU machine runs, without pytest-xdist, up to the list of tests."""
    monkeypatch.setattr(bench.run, "_test_files", lambda: ["tests/csrc_triton/test_multi_lora_compiled.py"])
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert run_tests(tmp_path, "r1", left(), lambda command, **rest: subprocess.run([*command, "--co"], **rest))
    (entry,) = records.read(tmp_path / TESTS)["files"].values()
    assert "tests collected in" in entry["summary"], "none deselected"


def test_the_package_is_the_same_command():
    out = subprocess.run(
        [sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for option in ("--budget-s", "--out", "--only", "--skip-tests"):
        assert option in out.stdout
