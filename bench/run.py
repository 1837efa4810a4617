"""Tests and benchmarks of a GPU machine in one command: `python -m bench [--budget-s N] [--out DIR]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import records
from bench.machine import ROOT, revision, slug
from bench.report import TESTS, write_report
from bench.timing import countdown

NO_GPU = 2
TEST_SHARE = 0.5
"""Largest part of the time for tests; the rest is for the cases."""
MORE_TIME = 1.5
"""A test file that the budget stopped is run again only with this many times the time that it had."""
TEST_OPTIONS = ("-m", "not soak")
"""In place of pyproject.toml's own -m, which leaves out the slow tests too."""
MAX_PROCESSES = 30
"""After this many broken processes another one will not do better."""
A_DAY = 86400.0
Run = Callable[..., subprocess.CompletedProcess]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the kernels' tests, then measures every case not yet measured at this revision, the most telling first.

    Returns:
        0; 1 where tests failed or the cases could not be measured; 2 without a GPU.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description="GPU tests, then benchmarks; see bench/README.md"
    )
    parser.add_argument(
        "--budget-s", type=float, default=A_DAY, help="stop after this many seconds; a later run goes on"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    parser.add_argument("--only", default="*", help="cases whose name matches this pattern, such as 'loss-*'")
    parser.add_argument("--skip-tests", action="store_true", help="only the benchmarks")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.run: no CUDA device found, nothing was run; `pytest bench` runs the cases for CPUs")
        return NO_GPU
    left = countdown(arguments.budget_s)
    folder = arguments.out / slug(torch.cuda.get_device_name(0))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tested = arguments.skip_tests or run_tests(folder, revision(), left)
        measured = run_cases(folder, left, arguments.only)
    finally:
        print(write_report(folder))
    return 0 if tested and measured else 1


def run_tests(folder: Path, current: str, left: Callable[[], float], run: Run = subprocess.run) -> bool:
    """Runs the kernels' test files that did not pass at this revision, and notes each outcome in the folder.

    Returns:
        False if a test failed, now or earlier at this revision.
    """
    note = records.read(folder / TESTS)
    if note is None or note["revision"] != current:
        note = {"revision": current, "files": {}}
    # The cases keep this much time, however long the tests take.
    for_cases = left() * (1 - TEST_SHARE)
    for file in _test_files():
        limit = left() - for_cases
        earlier = note["files"].get(file, {"outcome": "not run", "limit_s": 0})
        if earlier["outcome"] == "passed" or limit < MORE_TIME * earlier["limit_s"]:
            continue
        note["files"][file] = entry = _run_test_file(file, limit, run)
        records.write(folder / TESTS, note)
        print("\n".join([f"{file}: {entry['outcome']}; {entry['summary']}", *entry["failures"]]), flush=True)
    return not any(entry["outcome"] == "failed" for entry in note["files"].values())


def _test_files() -> list[str]:
    """Relative to the repository; first those of kernels on the GPU, last those that only compile, as any machine can."""
    files = [file.relative_to(ROOT).as_posix() for file in (ROOT / "tests" / "csrc_triton").glob("test_*.py")]
    return sorted(files, key=lambda file: ("_triton.py" not in file, "_compiled.py" in file, file))


def _run_test_file(file: str, limit: float, run: Run) -> dict:
    """A file's outcome: "passed", "failed" or "stopped"; limit_s is the time that stopped it, else 0."""
    command = [sys.executable, "-m", "pytest", "-q", *TEST_OPTIONS, file]
    try:
        done = run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        outcome = "passed" if done.returncode == 0 else "failed"
        output = done.stdout + done.stderr
        limit = 0
    except subprocess.TimeoutExpired as stopped:
        outcome = "stopped"
        output = stopped.stdout or ""
        if isinstance(output, bytes):  # on POSIX, even in text mode
            output = output.decode("utf-8", "replace")
    lines = [line for line in output.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"outcome": outcome, "summary": lines[-1] if lines else "", "failures": failures, "limit_s": limit}


def run_cases(folder: Path, left: Callable[[], float], only: str = "*", run: Run = subprocess.run) -> bool:
    """Measures the cases in a process of their own; where that breaks, the next one goes on without the culprit.

    Returns:
        False if no process reached the end of the cases or of the time.
    """
    for _ in range(MAX_PROCESSES):
        limit = left()
        if limit <= 0:
            return True
        command = [sys.executable, "-m", "bench.worker", str(folder), "--only", only, "--budget-s", str(limit)]
        try:
            code = run(command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            print("the time ended within a case; the next run tries it again", flush=True)
            return True
        if code in (0, 1):  # 1 is an error of Python outside any provider: the next process would meet it too
            return code == 0
        print(f"bench.worker ended with code {code}; the next process goes on", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
