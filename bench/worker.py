"""Measures cases one after another in one process; `bench.run` starts it again where a provider broke the GPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch

from bench import records
from bench.cases import Case, gpu_cases
from bench.machine import describe, revision
from bench.measure import Bench, DeviceLost, Progress, check_alive, describe_error, measure, release
from bench.providers import OURS
from bench.timing import CudaStopwatch
from bench.work import work_of

GPU = torch.device("cuda", 0)
DEVICE_LOST = 3
"""Exit code after a provider broke the GPU."""
FIRST_ESTIMATE_S = 30.0
"""Time that a case is expected to take before one was measured: compilation dominates."""


@dataclass
class Budget:
    """Seconds of a run; None for as long as it takes."""

    seconds: float | None
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self):
        self.start = self.clock()

    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - (self.clock() - self.start)


def measure_all(cases: Iterable[Case], folder: Path, bench: Bench, machine: dict, current: str, budget: Budget) -> int:
    """Measures the cases that are not finished at this revision, until the budget does not allow another.

    Args:
        machine: kept in each record.
        current: the revision.

    Returns:
        Number of cases left.

    Raises:
        DeviceLost: the GPU stopped working; the case's record says where.
    """
    todo = [case for case in cases if not records.is_finished(records.read(records.path_of(folder, case)), current)]
    taken = []
    for position, case in enumerate(todo):
        if budget.left() < max(taken, default=FIRST_ESTIMATE_S):
            return len(todo) - position
        begun = budget.clock()
        record = measure_one(case, folder, bench, machine, current)
        if record["status"] == "failed":
            check_alive(bench.device, case.name)
        release()
        taken.append(budget.clock() - begun)
    return 0


def measure_one(case: Case, folder: Path, bench: Bench, machine: dict, current: str) -> dict:
    """Measures a case and writes its record, at each step what is known so far.

    Raises:
        DeviceLost: as `measure.measure`; the record stays "running", without the provider for the next attempt.
    """
    path = records.path_of(folder, case)
    record = records.begin(case, current, records.read(path))
    record |= {"machine": machine, "work": asdict(work_of(case)), "allowed_errors": {}}

    def entering(place: str | None) -> None:
        record["current"] = place
        records.write(path, record)

    begun = time.monotonic()
    if record["status"] == "running":
        record |= _outcome(case, bench, Progress(record["providers"], entering, record["allowed_errors"]))
    record["seconds"] = round(time.monotonic() - begun, 1)
    entering(None)
    print(_line(record), flush=True)
    return record


def _outcome(case: Case, bench: Bench, progress: Progress) -> dict:
    """Status of a measured case, and the error where it failed as a whole."""
    try:
        measure(case, bench, progress)
    except DeviceLost:
        progress.entering(None)  # writes what the provider's entry says
        raise
    except Exception as error:
        return {"status": "failed", "error": describe_error(error)}
    return {"status": "done"}


def _line(record: dict) -> str:
    """The case in one line: ours beside the fastest other, or why there is nothing to tell."""
    if record["status"] == "failed":
        return f"{record['name']}: failed: {record['error']}"
    times = {name: entry["median_ms"] for name, entry in record["providers"].items() if "median_ms" in entry}
    faults = [name for name, entry in record["providers"].items() if "failed" in entry or "wrong" in entry]
    shown = ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    note = f"; failed: {', '.join(faults)}" if faults else ""
    return f"{record['name']}: {shown or 'nothing timed'} ms{note}" + ("" if OURS in times else f"; no {OURS}")


def main(argv: list[str] | None = None) -> int:
    """Measures the cases into a folder on the first GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget-s", type=float)
    parser.add_argument("--only", default="*")
    arguments = parser.parse_args(argv)
    budget = Budget(arguments.budget_s)
    os.environ["CLORA_BACKEND"] = "triton"  # so that ours raises, and is recorded, where it would fall back to eager
    stopwatch = CudaStopwatch(GPU)
    machine = describe(GPU, stopwatch)
    bench = Bench(GPU, stopwatch, machine["roof"])
    cases = [case for case in gpu_cases() if fnmatch(case.name, arguments.only)]
    try:
        left = measure_all(cases, arguments.folder, bench, machine, revision(), budget)
    except DeviceLost as error:
        print(f"the GPU stopped working {error}", flush=True)
        return DEVICE_LOST
    print(f"{len(cases) - left} of {len(cases)} cases finished", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
