"""The one command, with the processes that it starts replaced."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bench.run
from bench import records
from bench.cases import gpu_cases
from bench.machine import ROOT
from bench.report import NAME, TESTS
from bench.run import run_cases, run_tests, settle
from bench.worker import DEVICE_LOST, Budget

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


class Processes:
    """Stands in for subprocess.run: each call takes the next of `results`, a code, an output or an error."""

    def __init__(self, *results):
        self.results, self.commands, self.limits = list(results), [], []

    def __call__(self, command, timeout=None, **options):
        self.commands.append(command)
        self.limits.append(timeout)
        result = self.results.pop(0)
        if callable(result):
            result = result()
        if isinstance(result, BaseException):
            raise result
        code, output = result if isinstance(result, tuple) else (result, "")
        return subprocess.CompletedProcess(command, code, output, "")


def running(folder, place, number=0, current="r1"):
    """Leaves the record of a case that is being measured."""
    case = gpu_cases()[number]
    record = {**records.begin(case, current, None), "current": place}
    records.write(records.path_of(folder, case), record)
    return records.path_of(folder, case)


@NO_GPU
def test_without_a_gpu_one_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "bench.run", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no CUDA device found" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((1, 0), 1), ((0, 1), 1)])
def test_the_whole_command(codes, expected, tmp_path, monkeypatch, capsys):
    processes = Processes((codes[0], "== 5 passed in 1s ==\n"), codes[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU 1")
    monkeypatch.setattr(bench.run, "revision", lambda: "r1")
    monkeypatch.setattr(run_tests, "__defaults__", (processes,))
    monkeypatch.setattr(run_cases, "__defaults__", ("*", processes))
    assert bench.run.main(["--out", str(tmp_path), "--budget-s", "100", "--only", "loss-*"]) == expected
    tests, cases = processes.commands
    assert tests[1:] == ["-m", "pytest", "tests/csrc_triton", "-q"]
    assert cases[1:6] == ["-m", "bench.worker", str(tmp_path / "some-gpu-1"), "--only", "loss-*"]
    assert 49 < processes.limits[0] < 50
    assert 90 < float(cases[-1]) < 100
    assert "GPU tests" in (tmp_path / "some-gpu-1" / NAME).read_text()
    assert (records.read(tmp_path / "some-gpu-1" / TESTS)["outcome"] == "passed") == (codes[0] == 0)


def test_tests_that_passed_are_passed_over_and_others_are_not(tmp_path):
    outputs = (1, "FAILED tests/a.py::b - no\n1 failed in 1s\n"), (0, "2 passed in 1s\n"), (0, "2 passed in 1s\n")
    processes = Processes(*outputs)
    assert not run_tests(tmp_path, "r1", Budget(None), processes)
    note = records.read(tmp_path / TESTS)
    assert (note["outcome"], note["summary"]) == ("failed", "1 failed in 1s")
    assert note["failures"] == ["FAILED tests/a.py::b - no"]
    assert run_tests(tmp_path, "r1", Budget(None), processes)
    assert run_tests(tmp_path, "r1", Budget(None), processes)
    assert len(processes.commands) == 2
    assert run_tests(tmp_path, "r2", Budget(None), processes)
    assert len(processes.commands) == 3


def test_tests_that_the_budget_stopped_are_told_and_are_no_failure(tmp_path):
    assert run_tests(tmp_path, "r1", Budget(10), Processes(subprocess.TimeoutExpired("pytest", 5, b"....\n")))
    assert records.read(tmp_path / TESTS)["outcome"] == "stopped by the budget"


def test_a_crash_is_the_running_providers_and_the_next_process_goes_on(tmp_path):
    path = []
    processes = Processes(lambda: path.append(running(tmp_path, "ours_fused")) or -11, 0)
    assert run_cases(tmp_path, "r1", Budget(None), run=processes)
    record = records.read(path[0])
    assert record["providers"] == {"ours_fused": {"failed": "the process ended with code -11"}}
    assert record["status"] == "running"
    again = records.begin(gpu_cases()[0], "r1", record)
    assert again["providers"] == record["providers"]


def test_a_crash_while_timing_fails_the_case(tmp_path):
    path = running(tmp_path, "timing")
    assert settle(tmp_path, "r1", "*", "the process ended with code -9")
    assert records.read(path)["status"] == "failed"
    assert records.read(path)["error"] == "timing: the process ended with code -9"


@pytest.mark.parametrize(("current", "only"), [("r2", "*"), ("r1", "loss-*")])
def test_only_a_case_of_this_run_is_blamed(current, only, tmp_path):
    running(tmp_path, "ours")
    assert not settle(tmp_path, current, only, "crash")


def test_a_process_that_fails_outside_any_case_ends_the_run(tmp_path):
    assert not run_cases(tmp_path, "r1", Budget(None), run=Processes(1))


def test_a_lost_device_starts_the_next_process(tmp_path):
    processes = Processes(DEVICE_LOST, DEVICE_LOST, 0)
    assert run_cases(tmp_path, "r1", Budget(None), run=processes)
    assert len(processes.commands) == 3


def test_the_budget_ends_the_run(tmp_path):
    stopped = subprocess.TimeoutExpired("bench.worker", 5)
    assert run_cases(tmp_path, "r1", Budget(10), run=Processes(stopped))
    assert run_cases(tmp_path, "r1", Budget(0), run=Processes())
