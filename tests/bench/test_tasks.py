"""Tasks of a slice, by a clock that the test moves and commands that are replaced."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench import records
from bench.tasks import GRACE_S, MAX_PROCESSES, NOTES, Task, execute, run_tasks
from bench.timing import UNFINISHED, countdown
from bench.worker import DEVICE_LOST

MACHINE = {"gpu": "Some GPU", "commit": "abc", "revision": "r1", "tree": "t1"}


class Commands:
    """Stands in for `execute`: each call takes the next (seconds, exit code) and moves the clock."""

    def __init__(self, *results, output="== 5 passed in 1s ==\n"):
        self.results, self.output = list(results), output
        self.now, self.commands, self.limits, self.packed = 0.0, [], [], 0

    def __call__(self, command, log, limit, pack):
        self.commands.append(command)
        self.limits.append(limit)
        seconds, code = self.results.pop(0)
        self.now += min(seconds, limit)
        log.write_text(self.output)
        return code

    def pack(self):
        self.packed += 1


def run(commands, folder, *tasks, seconds=100.0, machine=MACHINE):
    left = countdown(seconds, lambda: commands.now)
    commands.now = 0.0
    passed = run_tasks(tasks, folder, machine, left, commands.pack, commands)
    return passed, {name: entry["outcome"] for name, entry in records.read(folder / NOTES).items()}


@pytest.mark.parametrize(
    ("code", "outcome", "passed"),
    [(0, "passed", True), (1, "failed", False), (None, "stopped", True), (UNFINISHED, "unfinished", True)],
)
def test_the_outcome_of_a_task(code, outcome, passed, tmp_path):
    commands = Commands((30, code))
    assert run(commands, tmp_path, Task("tests", ("pytest", "tests"))) == (passed, {"tests": outcome})


@pytest.mark.parametrize(
    ("code", "outcome", "passed"), [(1, "failed", False), (None, "stopped", False), (0, "passed", True)]
)
def test_failures_are_kept_and_count_though_the_time_ended_the_task(code, outcome, passed, tmp_path):
    commands = Commands((30, code), output="FAILED tests/a.py::b - no\n\n1 failed\n")
    assert run(commands, tmp_path, Task("tests", ("pytest", "tests"))) == (passed, {"tests": outcome})
    assert commands.commands == [[sys.executable, "-m", "pytest", "tests"]]
    entry = records.read(tmp_path / NOTES)["tests"]
    assert (entry["summary"], entry["failures"]) == ("1 failed", ["FAILED tests/a.py::b - no"])
    assert (entry["machine"], entry["seconds"]) == (MACHINE, 30)
    assert commands.packed == 1


def test_a_step_ends_at_its_own_limit_and_the_last_one_with_the_slice(tmp_path):
    commands = Commands((1000, None), (1000, UNFINISHED))
    tasks = Task("tests", ("pytest",), most_s=40), Task("cases", ("bench.worker", "{limit}"))
    assert run(commands, tmp_path, *tasks) == (True, {"tests": "stopped", "cases": "unfinished"})
    assert commands.limits == [40 - GRACE_S, 70 - GRACE_S]
    assert commands.commands[1][-1] == "60"
    assert commands.now <= 100 - GRACE_S


def test_what_would_not_end_in_time_or_cannot_run_is_not_begun(tmp_path):
    commands = Commands((50, 0))
    tasks = Task("one", ("a",)), Task("two", ("b",), least_s=51), Task("three", ("ncu",), reason="not installed")
    assert run(commands, tmp_path, *tasks) == (True, {"one": "passed", "two": "not run", "three": "not run"})
    notes = records.read(tmp_path / NOTES)
    assert notes["two"]["summary"] == "50 s left, it needs 51"
    assert notes["three"]["summary"] == "not installed"


def test_only_what_passed_with_the_same_sources_is_passed_over(tmp_path):
    commands = Commands((1, 0), (1, 1), (1, 0), (1, 0), (1, 0))
    tasks = Task("one", ("a",)), Task("two", ("b",))
    for machine, runs in ((MACHINE, 2), (MACHINE, 3), (MACHINE, 3), ({**MACHINE, "tree": "t2"}, 5)):
        run(commands, tmp_path, *tasks, machine=machine)
        assert len(commands.commands) == runs


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [((DEVICE_LOST, -11, 0), "passed"), ((1,), "failed"), ((-11,) * MAX_PROCESSES, "failed"), ((None,), "stopped")],
)
def test_a_process_that_a_provider_broke_is_followed_by_another(codes, outcome, tmp_path):
    commands = Commands(*[(2, code) for code in codes])
    task = Task("cases", ("bench.worker",), most_s=60, restarts=True)
    assert run(commands, tmp_path, task)[1] == {"cases": outcome}
    assert commands.results == []
    assert commands.limits == [60 - GRACE_S - 2 * i for i in range(len(codes))]


def test_no_process_is_begun_after_the_time_of_those_before(tmp_path):
    commands = Commands((45, -11))
    task = Task("cases", ("bench.worker",), most_s=55, restarts=True)
    assert run(commands, tmp_path, task) == (True, {"cases": "stopped"})


def test_ncu_is_a_program_of_its_own(tmp_path):
    commands = Commands((1, 0))
    run(commands, tmp_path, Task("ncu", ("ncu", "python")))
    assert commands.commands == [["ncu", "python"]]


def test_a_command_runs_into_its_log(tmp_path):
    log = tmp_path / "a.log"
    assert execute([sys.executable, "-c", "print(7); raise SystemExit(4)"], log, 60.0, lambda: None) == 4
    assert log.read_text() == "7\n"


def test_the_time_in_which_results_are_packed_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.tasks.POLL_S", 0.1)
    begun = time.monotonic()
    assert execute(["sleep", "60"], tmp_path / "a.log", 2.0, lambda: time.sleep(0.9)) is None
    assert time.monotonic() - begun < 6


def test_a_command_is_interrupted_at_its_limit_with_its_children(tmp_path, monkeypatch):
    """It prints what it has, and a child that ignores the interrupt is killed."""
    monkeypatch.setattr("bench.tasks.POLL_S", 0.5)
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    log, packed, begun = tmp_path / "a.log", [], time.monotonic()
    assert execute([sys.executable, "-c", program], log, 3.0, lambda: packed.append(1)) is None
    assert time.monotonic() - begun < 30
    pid, last = log.read_text().split()
    assert last == "interrupted"
    assert len(packed) >= 3
    time.sleep(0.2)
    command = Path(f"/proc/{pid}/cmdline")
    assert not command.exists() or not command.read_text(), "a dead process that nobody waits for has no command"
