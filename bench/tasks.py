"""Tasks of a slice: commands with a time limit, whose outcome and output are kept beside the records."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from bench import records
from bench.machine import ROOT
from bench.timing import UNFINISHED, countdown

NOTES = "tasks.json"
GRACE_S = 10.0
"""From the interrupt of a task at its limit to its end: pytest prints what has failed so far."""
POLL_S = 15.0
"""Results are packed this often, in case that the machine is taken away."""
MAX_PROCESSES = 10
"""After this many broken processes another one will not do better."""


@dataclass(frozen=True)
class Task:
    """A command of a slice.

    Attributes:
        command: after ``python -m``, or from "ncu" on whole; "{limit}" in it stands for the seconds that it gets.
        most_s: ends at this many seconds, or with the slice.
        least_s: is not begun with less time than this, in which its processes would only start.
        restarts: a process that ended by a signal or a lost GPU is followed by another, which goes on without the culprit.
        reason: why the task cannot run here; empty where it can.
    """

    name: str
    command: tuple[str, ...]
    most_s: float = inf
    least_s: float = 60.0
    restarts: bool = False
    reason: str = ""


Execute = Callable[[Sequence[str], Path, float, Callable[[], None]], int | None]
"""Runs a command into a log file for at most some seconds, calling the function now and then; its exit code, or None where
the time ended it."""


def run_tasks(
    tasks: Sequence[Task], folder: Path, machine: dict, left: Callable[[], float], pack: Callable[[], None],
    execute: Execute,
) -> bool:  # fmt: skip
    """Runs the tasks that have not passed with this machine's tree, and notes each outcome in the folder at once.

    Args:
        machine: kept with each outcome.
        left: returns the seconds that are left to the slice.
        pack: keeps the folder's files for good.

    Returns:
        False where a task failed, or has printed failures before its time ended.
    """
    notes = records.read(folder / NOTES) or {}
    for task in tasks:
        earlier = notes.get(task.name)
        if earlier and earlier["outcome"] == "passed" and earlier["machine"].get("tree") == machine["tree"]:
            print(f"{task.name}: passed before, with the same sources", flush=True)
            continue
        if task.reason or left() < task.least_s:
            reason = task.reason or f"{left():.0f} s left, it needs {task.least_s:.0f}"
            entry = {"outcome": "not run", "summary": reason, "failures": [], "seconds": 0}
        else:
            print(f"{task.name}: begins, {left():.0f} s left", flush=True)
            entry = _run(task, folder, left, pack, execute)
        notes[task.name] = entry | {"machine": machine}
        records.write(folder / NOTES, notes)
        print("\n".join([f"{task.name}: {entry['outcome']}; {entry['summary']}", *entry["failures"]]), flush=True)
        pack()
    return not any(has_failed(notes[task.name]) for task in tasks)


def has_failed(entry: dict) -> bool:
    return entry["outcome"] == "failed" or (entry["outcome"] == "stopped" and bool(entry["failures"]))


def _run(task: Task, folder: Path, left: Callable[[], float], pack: Callable[[], None], execute: Execute) -> dict:
    """One task to its end; its output goes into ``<name>.log``."""
    program = () if task.command[0] == "ncu" else (sys.executable, "-m")
    log = folder / f"{task.name}.log"
    log.unlink(missing_ok=True)
    begun = left()
    for _ in range(MAX_PROCESSES if task.restarts else 1):
        limit = min(task.most_s - (begun - left()), left()) - GRACE_S
        if limit < 1:  # the processes before have used up the time
            code = None
            break
        command = [part.replace("{limit}", f"{limit:.0f}") for part in (*program, *task.command)]
        code = execute(command, log, limit, pack)
        # 1 is an error of Python outside any provider: the next process would meet it too.
        if code is None or 0 <= code <= 2 or code == UNFINISHED:
            break
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    outcomes = {0: "passed", None: "stopped", UNFINISHED: "unfinished"}
    return {
        "outcome": outcomes.get(code, "failed"),
        "summary": lines[-1][:300] if lines else "",
        "failures": [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))],
        "seconds": round(begun - left(), 1),
    }


def execute(command: Sequence[str], log: Path, limit: float, pack: Callable[[], None]) -> int | None:
    """Runs a command in the repository as `Execute` describes; at the limit it is interrupted, then killed with its children."""
    left = countdown(limit)  # packing takes of it too
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            while left() > 0:
                try:
                    return process.wait(min(POLL_S, max(left(), 0)))
                except subprocess.TimeoutExpired:
                    pack()
            process.send_signal(signal.SIGINT)
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill(process)
    return None


def _kill(process: subprocess.Popen) -> None:
    """Ends the session of a process, its children included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
