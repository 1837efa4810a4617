"""Tests and measurements of a GPU machine in slices: `python -m bench.gpu [--slice N] [--out DIR]` (bench/README.md).

Each slice ends by itself within its budget. All results lie in one archive, which the next slice reads first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import records, report, wheels
from bench.arguments import CANNOT_RUN, Parser, duration, new_folder, require_gpu, run, whole
from bench.machine import describe, slug, tree
from bench.tasks import NOTES, Task, execute, run_tasks
from bench.timing import countdown
from clora.errors import CloraError
from csrc_triton.multi_lora.designs import DESIGNS

GPU = torch.device("cuda", 0)
BUDGET_S = 560.0
"""Of a slice: ten minutes, less the start of the machine's processes."""
SLICES = (1, 2, 3, 4, 5)
ARCHIVE = "clora-gpu.tar.gz"
KEPT = (".json", ".md", ".log", ".csv")
DEMO_S = 450.0
"""Left to the demo, which takes minutes on two CPU cores; not measured on a GPU."""
MAX_BYTES = 4 << 20
"""Larger files stay out of the archive."""
KERNEL_TESTS = ("pytest", "-q", "-n", "auto", "tests/csrc_triton", "tests/training", "tests/bank")
NCU = ("ncu", "--clock-control", "none", "--set", "full", "--profile-from-start", "off", "--csv", "--page", "details")


def slices(folder: Path, every_case: bool) -> dict[int, list[Task]]:
    """The tasks of each slice, in order; the last one of a slice has what the others leave."""
    worker = ("bench.worker", str(folder), "--budget-s", "{limit}", "--cases")
    cases = "every" if every_case else "telling"
    ncu = "" if shutil.which("ncu") else "ncu is not installed"
    return {
        1: [
            Task("tests", KERNEL_TESTS, most_s=290),
            Task("designs", (*worker, "designs"), restarts=True),
        ],
        2: [Task("cases", (*worker, cases), restarts=True)],
        3: [
            Task(
                f"ncu-{design}",
                (*NCU, "--log-file", str(folder / f"ncu-{design}.csv"), sys.executable, "-m", "bench.profiled", design),
                most_s=180,
                reason=ncu,
            )
            for design in DESIGNS
        ],
        4: [
            _module("bench.step", folder, most_s=130),
            _module("bench.serving", folder, most_s=110),
            Task("slow-tests", (*KERNEL_TESTS, "-m", "slow")),
        ],
        5: [Task("demo", ("clora", "demo", "--device", "cuda", "--out", str(folder / "demo")), least_s=DEMO_S)],
    }


def _module(name: str, folder: Path, most_s: float) -> Task:
    """A benchmark with a command of its own, which writes into the GPU's folder below ``--out``."""
    return Task(name.removeprefix("bench."), (name, "--out", str(folder.parent), "--budget-s", "{limit}"), most_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the slices, keeps their results and prints a table.

    Returns:
        0; 1 where a task failed; 2 without a GPU, or where packages are missing.
    """
    parser = Parser("bench.gpu", main.__doc__.splitlines()[0])
    parser.add_argument("--slice", type=whole(most=len(SLICES)), nargs="+", default=SLICES, help="1 to 5; default: all")
    parser.add_argument(
        "--out", type=new_folder, default=Path(), help=f"folder of {ARCHIVE}, which is continued; default: ."
    )
    parser.add_argument(
        "--budget-s", type=duration, default=BUDGET_S, help="of each slice, not of all together; default: %(default).0f"
    )
    parser.add_argument("--all", action="store_true", help="slice 2: every case, for hours, not only the telling ones")
    arguments = parser.parse_args(argv)
    least = min(task.least_s for number in arguments.slice for task in slices(Path(), arguments.all)[number])
    if arguments.budget_s < least:
        parser.error(
            f"argument --budget-s: expected at least {least:.0f}, found {arguments.budget_s:g}, in which no task fits"
        )
    if names := wheels.missing():
        print(f"bench.gpu: nothing was run; {wheels.advice(names)}")
        return CANNOT_RUN
    require_gpu(GPU)
    machine = describe(GPU) | {"tree": tree()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    archive = arguments.out / ARCHIVE
    passed = True
    with tempfile.TemporaryDirectory() as place:
        if archive.exists():
            unpack(archive, Path(place))
        folder = Path(place) / slug(machine["gpu"])
        folder.mkdir(exist_ok=True)
        for number in arguments.slice:
            left = countdown(arguments.budget_s)
            tasks = slices(folder, arguments.all)[number]
            passed &= run_tasks(tasks, folder, machine, left, lambda: pack(Path(place), archive), execute)
        report.write_report(folder)
        pack(Path(place), archive)
        print(f"\nresults: {archive}\n")
        print(report.summary(records.read_all(folder), records.read(folder / NOTES)))
    return 0 if passed else 1


def unpack(archive: Path, place: Path) -> None:
    """Lays the results of earlier slices into a folder.

    Raises:
        CloraError: the archive is damaged.
    """
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(place, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        found = f"{archive}: expected the results of earlier slices, found a damaged archive ({error})"
        raise CloraError(f"{found}; restore it, or remove it to begin again") from error


def pack(place: Path, archive: Path) -> None:
    """Writes the small text files below a folder into one archive, whole or not at all."""
    new = archive.with_name(archive.name + ".new")
    with tarfile.open(new, "w:gz") as packed:
        # Tasks still write: what is gone meanwhile is left out, and what lies in hidden folders is not finished.
        for folder, inner, files in os.walk(place):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for file in (Path(folder) / name for name in sorted(files) if name.endswith(KEPT)):
                with contextlib.suppress(FileNotFoundError):
                    if file.stat().st_size <= MAX_BYTES:
                        packed.add(file, str(file.relative_to(place)))
    new.replace(archive)


if __name__ == "__main__":
    run(main)
