"""Measures cases one after another in one process; `bench.tasks` starts it again where a provider broke the GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from bench import records
from bench.arguments import Parser, duration, new_folder, require_gpu, run
from bench.cases import CASES, Case, DesignCase, rows_per_adapter
from bench.machine import describe, measure_roof
from bench.measure import Bench, DeviceLost, measure, release
from bench.timing import UNFINISHED, CudaStopwatch, countdown
from csrc_triton.multi_lora.designs import Shape, exact_design, gpu_device, rows_to_merge

GPU = torch.device("cuda", 0)
DEVICE_LOST = 3
"""Exit code after a provider broke the GPU."""
FIRST_ESTIMATE_S = 30.0
"""Expected time of a case before one was measured: compilation dominates."""


def measure_all(
    cases: Iterable[Case], folder: Path, bench: Bench, machine: dict, current: str, left: Callable[[], float]
) -> int:
    """Measures the cases that are not finished at this revision, until the time left is shorter than the last ones took.

    Args:
        machine: kept in each record; its capability and Triton choose the designs.
        current: the revision.
        left: returns the seconds that are left.

    Returns:
        Number of cases left.

    Raises:
        DeviceLost: the GPU stopped working; the case's record names the provider.
    """
    todo = []
    for case in cases:
        record = records.read(records.path_of(folder, case))
        if not records.is_finished(record, current, chosen_designs(case, machine)):
            todo.append(case)
    taken = []
    for position, case in enumerate(todo):
        begun = left()
        # The slowest of the last three stands for the next case.
        if begun < max(taken[-3:], default=FIRST_ESTIMATE_S):
            return len(todo) - position
        measure_one(case, folder, bench, machine, current)
        release()
        taken.append(begun - left())
    return 0


def measure_one(case: Case, folder: Path, bench: Bench, machine: dict, current: str) -> dict:
    """Measures a case and writes its record, after each step as far as it goes."""
    path = records.path_of(folder, case)
    record = records.begin(case, current, chosen_designs(case, machine), records.read(path)) | {"machine": machine}
    begun = time.monotonic()
    # A record that begins as failed has ended too many processes; it is only written.
    if record["status"] == "running":
        measure(case, bench, record, lambda: records.write(path, record))
    record |= {"current": None, "seconds": round(time.monotonic() - begun, 1)}
    records.write(path, record)
    print(_line(record), flush=True)
    return record


def chosen_designs(case: Case, machine: dict) -> list[str]:
    """The choice of `designs.json` for each layer of a case on this machine: with another one it is measured anew."""
    if isinstance(case, DesignCase):  # which forces each design
        return []
    gpu = gpu_device(machine["capability"], machine["triton"])
    chosen = []
    for k, n in case.layers:
        shape = Shape(k, n, case.rank, case.dtype)
        # A forward case's adapters are frozen, and as strong as its base (`linear.make_inputs`).
        merged = getattr(case, "mode", "forward") == "forward" and rows_per_adapter(case) >= rows_to_merge(shape, gpu)
        chosen.append("merged" if merged else exact_design(case.tokens, shape, gpu))
    return chosen


def _line(record: dict) -> str:
    """The case in one line: the times of all providers, or the error."""
    if record["status"] == "failed":
        return f"{record['name']}: failed: {record['error']}"
    times = {name: entry["median_ms"] for name, entry in record["providers"].items() if "median_ms" in entry}
    shown = ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    missing = ", ".join(name for name in record["providers"] if name not in times)
    return f"{record['name']}: {shown or 'nothing timed'} ms" + (f"; not timed: {missing}" if missing else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures cases into a folder on the first GPU."""
    parser = Parser("bench.worker", main.__doc__)
    parser.add_argument("folder", type=new_folder)
    parser.add_argument("--budget-s", type=duration, required=True)
    parser.add_argument("--cases", choices=CASES, required=True)
    arguments = parser.parse_args(argv)
    require_gpu(GPU)
    left = countdown(arguments.budget_s)
    os.environ["CLORA_BACKEND"] = "triton"  # so that ours raises, and is recorded, where it would fall back to eager
    stopwatch = CudaStopwatch(GPU)
    machine = describe(GPU) | {"roof": measure_roof(GPU, stopwatch)}
    bench = Bench(GPU, stopwatch, machine["roof"])
    cases = CASES[arguments.cases]()
    try:
        remaining = measure_all(cases, arguments.folder, bench, machine, machine["revision"], left)
    except DeviceLost as error:
        print(f"the GPU stopped working {error}", flush=True)
        return DEVICE_LOST
    print(f"{len(cases) - remaining} of {len(cases)} cases finished", flush=True)
    return UNFINISHED if remaining else 0


if __name__ == "__main__":
    run(main)
