"""Tests and benchmarks of a GPU machine in one command: `python -m bench.run [--budget-s N] [--out DIR]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch

from bench import records
from bench.cases import gpu_cases
from bench.machine import ROOT, revision, slug
from bench.report import TESTS, write_report
from bench.worker import DEVICE_LOST, Budget

NO_GPU = 2
TEST_COMMAND = ("-m", "pytest", "tests/csrc_triton", "-q")
TEST_SHARE = 0.5
"""Of the time left, at most; the rest is for the cases."""
Run = Callable[..., subprocess.CompletedProcess]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the GPU tests, then measures every case that is not yet measured at this revision, the most telling first.

    Returns:
        0; 1 where tests failed or the cases could not be measured; 2 without a GPU.
    """
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.run: no CUDA device found, nothing was run; `pytest bench` runs what a CPU can")
        return NO_GPU
    budget = Budget(arguments.budget_s)
    folder = arguments.out / slug(torch.cuda.get_device_name(0))
    folder.mkdir(parents=True, exist_ok=True)
    current = revision()
    try:
        tested = arguments.skip_tests or run_tests(folder, current, budget)
        measured = run_cases(folder, current, budget, arguments.only)
    finally:
        print(write_report(folder))
    return 0 if tested and measured else 1


def run_tests(folder: Path, current: str, budget: Budget, run: Run = subprocess.run) -> bool:
    """Runs the kernels' tests unless they passed at this revision, and notes the outcome in the folder.

    Returns:
        Whether they passed, or there was no time to tell.
    """
    earlier = records.read(folder / TESTS)
    if earlier is not None and (earlier["revision"], earlier["outcome"]) == (current, "passed"):
        print("GPU tests: passed at this revision already")
        return True
    limit = None if budget.seconds is None else budget.left() * TEST_SHARE
    try:
        done = run([sys.executable, *TEST_COMMAND], cwd=ROOT, capture_output=True, text=True, timeout=limit)
        outcome, output = "passed" if done.returncode == 0 else "failed", done.stdout + done.stderr
    except subprocess.TimeoutExpired as stopped:
        outcome, output = "stopped by the budget", _text(stopped.stdout)
    lines = [line for line in output.splitlines() if line.strip()]
    summary, failures = lines[-1] if lines else "", [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    note = {"command": "pytest " + " ".join(TEST_COMMAND[2:]), "revision": current, "outcome": outcome}
    records.write(folder / TESTS, {**note, "summary": summary, "failures": failures})
    print("\n".join(["GPU tests: " + outcome, *failures, summary]), flush=True)
    return outcome != "failed"


def run_cases(folder: Path, current: str, budget: Budget, only: str = "*", run: Run = subprocess.run) -> bool:
    """Measures the cases in a process of their own; where that ends abnormally, the next one goes on without the culprit.

    Returns:
        False where it ended abnormally and no case tells why.
    """
    while budget.left() > 0:
        limit = None if budget.seconds is None else budget.left()
        command = [sys.executable, "-m", "bench.worker", str(folder), "--only", only]
        try:
            code = run(
                command if limit is None else [*command, "--budget-s", str(limit)], cwd=ROOT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            print("the budget ended within a case; the next run tries it again")
            return True
        if code == 0:
            return True
        if code != DEVICE_LOST and not settle(folder, current, only, f"the process ended with code {code}"):
            print(f"bench.worker ended with code {code} outside any case")
            return False
    return True


def settle(folder: Path, current: str, only: str, error: str) -> bool:
    """Blames what was running when a process ended; returns whether a case of this revision was."""
    for case in gpu_cases():
        path = records.path_of(folder, case)
        record = records.read(path) if fnmatch(case.name, only) else None
        if record is None or record["revision"] != current or record["status"] != "running" or not record["current"]:
            continue
        records.blame(record, record["current"], error)
        records.write(path, record)
        return True
    return False


def _text(output: bytes | str | None) -> str:
    """What a stopped process had printed; subprocess hands it over as bytes."""
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description="GPU tests, then benchmarks; see bench/README.md"
    )
    parser.add_argument("--budget-s", type=float, help="stop after this many seconds; the next run goes on from there")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    parser.add_argument("--only", default="*", help="cases whose name matches this pattern, such as 'loss-*'")
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())
