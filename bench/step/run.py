"""A whole distillation update in four ways: losses compared, then speed and peak memory, each way in its own processes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch

from bench import machine, records
from bench.arguments import RESULTS, Parser, default_device, device_here, duration, new_folder, run, whole
from bench.machine import ROOT
from bench.step.worker import LOSSES, WAYS
from bench.step.world import CPU_CASES, GPU_CASES, StepCase
from bench.timing import UNFINISHED, countdown

BASELINE = "three_copies"
TOLERANCE = 1e-5
"""Largest relative difference of a loss, in fp32."""
CHECKED_UPDATES = 2
"""The losses of the second show the first one's gradients."""
GOALS = {"cpu": {"memory": 0.45, "speed": 1.25}, "cuda": {"memory": 0.4, "speed": 3.0}}
"""Of the case `GOAL_CASE`, times the baseline's: at most the memory, at least the speed."""
GOAL_CASE = "step-100m"
A_DAY = 86400.0
Run = Callable[[Sequence[str], float], dict]
"""Runs a worker with these arguments for at most some seconds; `subprocess.TimeoutExpired` where they end it."""


def main(argv: Sequence[str] | None = None, run_job: Run | None = None) -> int:
    """Measures every case, goes on where an earlier run stopped, and prints a table.

    Returns:
        0; 1 if a way's losses are others than the baseline's, or it failed; 4 if the time ended first.
    """
    parser = Parser("bench.step", __doc__.splitlines()[0])
    parser.add_argument("--device", type=device_here, default=default_device())
    parser.add_out(RESULTS)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=whole(), default=5, help="processes of each way, in turns")
    parser.add_argument("--updates", type=whole(2), default=3, help="updates of a process, the first untimed")
    parser.add_argument("--budget-s", type=duration, default=A_DAY, help="stop after this time; a later run goes on")
    arguments = parser.parse_args(argv)
    device = arguments.device
    cases = [case for case in (CPU_CASES if device.type == "cpu" else GPU_CASES) if arguments.only in case.name]
    if not cases:
        known = ", ".join(case.name for case in CPU_CASES)
        parser.error(f"argument --only: expected a part of {known}, found {arguments.only!r}")
    left = countdown(arguments.budget_s)
    place = machine.slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    folder = new_folder(parser.out(arguments, "updates") / place)
    tables, ok = [], True
    for case in cases:
        path = folder / f"{case.name}.json"
        record = begin(case, device, records.read(path))
        for job in jobs(record, arguments.rounds):
            if left() <= 0:
                break
            try:
                do(job, record, device, arguments.updates, partial(run_job or run_worker, limit=max(left(), 0)))
            except subprocess.TimeoutExpired:
                break
            record["summary"] = summary(record, device.type)
            records.write(path, record)
        tables.append(table(record))
        ok = ok and not any("failed" in entry for entry in record["ways"].values())
    print("\n\n".join(tables))
    if not ok:
        return 1
    return UNFINISHED if left() <= 0 else 0


def begin(case: StepCase, device: torch.device, earlier: dict | None) -> dict:
    """Returns the record of a case: the earlier one, if it is of these sources and sizes, else a new one."""
    tree = machine.tree()  # not the commit, which a copy without git or with changes does not have
    sizes = json.loads(json.dumps(asdict(case)))
    if earlier is not None and earlier.get("tree") == tree and earlier["step"] == sizes:
        return earlier
    ways: dict[str, dict] = {way: {"rounds": []} for way in WAYS}
    if device.type == "cpu":
        ways["ours_triton"] = {"unavailable": "needs a GPU"}
    return {
        "name": case.name,
        "step": sizes,
        "tree": tree,
        "commit": machine.commit(),
        "machine": machine.describe_host(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "ways": ways,
    }


def jobs(record: dict, rounds: int) -> Iterator[tuple[str, str]]:
    """Yields ("check" or "time", way) of what is left: first all checks, then rounds, each beginning with another way."""
    ways = record["ways"]
    for way in ways:
        if "unavailable" not in ways[way] and "losses" not in ways[way]:
            yield "check", way
    names = list(ways)
    for turn in range(rounds):
        first = turn % len(names)
        for way in names[first:] + names[:first]:
            if not {"failed", "unavailable"} & ways[way].keys() and len(ways[way]["rounds"]) == turn:
                yield "time", way


def do(job: tuple[str, str], record: dict, device: torch.device, updates: int, run: Run) -> None:
    """Runs a process and notes what came of it in the record."""
    kind, way = job
    entry = record["ways"][way]
    command = [record["name"], way, "--device", str(device)]
    if kind == "check":
        command += ["--dtype", "float32", "--updates", str(CHECKED_UPDATES)]
    else:
        command += ["--updates", str(updates)]
    result = run(command)
    if "failed" in result:
        entry["failed"] = result["failed"]
    elif kind == "check":
        entry["losses"] = result["losses"]
        difference = largest_difference(result["losses"], record["ways"][BASELINE].get("losses", []))
        entry["largest_difference"] = difference
        if not difference <= TOLERANCE:
            entry["failed"] = f"its losses differ from those of {BASELINE} by {difference:.1e}, allowed {TOLERANCE:.0e}"
    else:
        figures = ("seconds", "clock", "threads", "peak_mib", "before_mib")
        entry["rounds"].append({name: result[name] for name in figures})


def run_worker(command: Sequence[str], limit: float = A_DAY) -> dict:
    """Runs ``python -m bench.step.worker``; returns what it printed, or ``failed`` with the end of its error."""
    worker = [sys.executable, "-m", "bench.step.worker", *command]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"failed": last}
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(losses: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]]) -> float:
    """Returns the largest relative difference of a loss of any update; NaN if there is nothing to compare with."""
    if len(losses) != len(expected):
        return float("nan")
    differences = [0.0]
    for own, other in zip(losses, expected, strict=True):
        differences += [abs(own[name] - other[name]) / max(abs(other[name]), 1e-12) for name in LOSSES]
    return max(differences)


def summary(record: dict, device_type: str) -> dict[str, dict]:
    """Returns medians and spread of the ways that were timed, and what they are of the baseline's."""
    samples = record["step"]["samples"]
    figures = {}
    for way, entry in record["ways"].items():
        if not entry.get("rounds"):
            continue
        seconds = [statistics.mean(row["seconds"]) for row in entry["rounds"]]
        peaks = [row["peak_mib"] for row in entry["rounds"]]
        figures[way] = {
            "updates_per_s": 1 / statistics.median(seconds),
            "samples_per_s": samples / statistics.median(seconds),
            "fastest_and_slowest_s": [min(seconds), max(seconds)],
            "peak_mib": statistics.median(peaks),
            "rounds": len(seconds),
        }
    base = record["ways"][BASELINE].get("rounds", [])
    for way, own in figures.items():
        # Within a round, so that what else the machine does weighs on both.
        pairs = list(zip(record["ways"][way]["rounds"], base, strict=False))
        if pairs:
            own["speed"] = statistics.median(sum(b["seconds"]) / sum(a["seconds"]) for a, b in pairs)
            own["memory"] = statistics.median(a["peak_mib"] / b["peak_mib"] for a, b in pairs)
    goals = GOALS[device_type]
    for way in ("ours_triton" if device_type == "cuda" else "ours_eager", "ours_one_row"):
        if record["name"] == GOAL_CASE and "speed" in figures.get(way, {}):
            own = figures[way]
            own["goals"] = {
                "memory": {"goal": goals["memory"], "met": own["memory"] <= goals["memory"]},
                "speed": {"goal": goals["speed"], "met": own["speed"] >= goals["speed"]},
            }
    return figures


def table(record: dict) -> str:
    """Returns a case's figures as a table in Markdown."""
    figures = record.get("summary", {})
    lines = [
        f"**{record['name']}** ({record['step']['samples']} samples, {record['step']['teachers']} teachers, "
        f"{record['step']['dtype']}, {record['gpu'] or record['machine']['processor']})",
        "",
        "| way | updates/s | samples/s | x | seconds an update, least to most | peak MiB | x |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, entry in record["ways"].items():
        own = figures.get(way)
        if own is None or "speed" not in own:
            reason = entry.get("unavailable") or entry.get("failed") or "not measured yet"
            lines.append(f"| {way} | {reason} | | | | | |")
            continue
        low, high = own["fastest_and_slowest_s"]
        lines.append(
            f"| {way} | {own['updates_per_s']:.3g} | {own['samples_per_s']:.3g} | {own['speed']:.2f} "
            f"| {low:.3g} to {high:.3g} | {own['peak_mib']:.0f} | {own['memory']:.2f} |"
        )
    for way, own in figures.items():
        for name, goal in own.get("goals", {}).items():
            sign = "<=" if name == "memory" else ">="
            lines.append(
                f"\n{way}, {name}: {own[name]:.2f}, goal {sign} {goal['goal']}, {'met' if goal['met'] else 'not met'}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
