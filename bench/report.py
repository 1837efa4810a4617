"""RESULTS.md from the records of a GPU: goals, cases that others win, every figure, failures.

`python -m bench.report FOLDER` makes it anew, on any machine.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import records
from bench.arguments import Parser, run
from bench.goals import Record, Verdict, fastest_other, median, over_fastest_other, verdicts
from bench.providers import BASE, OURS, is_ours
from bench.tasks import NOTES

NAME = "RESULTS.md"
FAMILIES = {
    "LinearCase": "Linear layers",
    "AddCase": "Low-rank part",
    "DesignCase": "Designs",
    "LossCase": "Loss",
    "StackCase": "Transformer stack",
}
FAULTS = ("wrong", "failed", "unavailable")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes RESULTS.md and prints its place."""
    parser = Parser("bench.report", __doc__.splitlines()[0])
    parser.add_argument("folder", type=measured_folder, help="of a GPU's records, such as bench/results/<gpu>")
    print(write_report(parser.parse_args(argv).folder))
    return 0


def measured_folder(text: str) -> Path:
    """Reads a folder that holds what `python -m bench.gpu` has kept."""
    folder = Path(text)
    if not records.read_all(folder) and not (folder / NOTES).is_file():
        found = "none there" if folder.is_dir() else "no such folder"
        raise argparse.ArgumentTypeError(
            f"expected a folder with records of python -m bench.gpu, found {found}: {text}; unpack its archive first"
        )
    return folder


def write_report(folder: Path) -> Path:
    """Writes RESULTS.md beside the records of `folder`."""
    path = folder / NAME
    path.write_text(report(records.read_all(folder), records.read(folder / NOTES)), "utf-8")
    return path


def summary(found: Sequence[Record], notes: dict | None = None) -> str:
    """The tables that fit on a screen: outcomes of the tasks, designs, goals. Arguments as in `report`."""
    done = [record for record in found if record["status"] == "done"]
    judged = [verdict for verdict in verdicts(done) if verdict.met is not None]
    sections = [_tasks(notes), _designs(done), _goals(judged) if judged else []]
    return "\n\n".join("\n".join(section) for section in sections if section)


def figures(found: Sequence[Record]) -> str:
    """The tables of all providers, by family."""
    done = [record for record in found if record["status"] == "done"]
    sections = (_family(family, title, done) for family, title in FAMILIES.items())
    return "\n\n".join("\n".join(section) for section in sections if section)


def report(found: Sequence[Record], notes: dict | None = None) -> str:
    """The report as Markdown.

    Args:
        found: records of one GPU, of any status.
        notes: outcomes of the tasks, as `bench.tasks` noted them.
    """
    finished = [record for record in found if record["status"] != "running"]
    done = [record for record in finished if record["status"] == "done"]
    sections = [
        ["# Results", "", "Made by `python -m bench.report` from the JSON files beside it; do not edit."],
        _machines(finished),
        _tasks(notes),
        _designs(done),
        ["## Goals", "", *_goals(verdicts(done))],
        ["## Slower than another provider", "", *_losses(done)],
        *(_family(family, title, done) for family, title in FAMILIES.items()),
        ["## Not timed", "", *_faults(finished)],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _machines(finished: Sequence[Record]) -> list[str]:
    """One line per machine, software and revision."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in finished:
        # Each process measures the roof anew: another roof is not another machine.
        machine = {key: value for key, value in record["machine"].items() if key != "roof"}
        groups[json.dumps([machine, record["revision"]], sort_keys=True)].append(record)
    lines = []
    for group in groups.values():
        machine = group[0]["machine"]
        keys = ("commit", "driver", "python", "torch", "cuda", "triton", "peft")
        versions = ", ".join(f"{key} {machine[key]}" for key in keys)
        roofs = [record["machine"]["roof"] for record in group]
        lines.append(
            f"- {machine['gpu']}, {versions}; revision {group[0]['revision']}; {len(group)} cases; roof as measured: "
            f"{_range(roof['tflop_per_s'] for roof in roofs)} TFLOP/s (bf16 product of 8192), "
            f"{_range(roof['gb_per_s'] for roof in roofs)} GB/s (copy)."
        )
    return lines or ["Nothing was measured yet."]


def _tasks(notes: dict | None) -> list[str]:
    """The tasks of the slices that were run, and what failed in them."""
    if not notes:
        return ["Tasks: none was run."]
    rows = []
    for name, entry in notes.items():
        machine = entry["machine"]
        versions = [machine[key] for key in ("gpu", "commit", "revision")]
        rows.append([name, entry["outcome"], f"{entry['seconds']:.0f}", *versions, entry["summary"]])
    failures = [f"- `{failure}`" for entry in notes.values() for failure in entry["failures"]]
    header = ["task", "outcome", "seconds", "GPU", "commit", "revision", "last line"]
    return [*_table(header, rows), *([""] if failures else []), *failures]


def _designs(done: Sequence[Record]) -> list[str]:
    """Each design over the base layer, one row per case."""
    found = [record for record in done if record["family"] == "DesignCase"]
    names = sorted({name for record in found for name in record["providers"] if is_ours(name)})
    rows = []
    for record in found:
        base = median(record, BASE)
        times = [median(record, name) for name in names]
        rows.append([record["name"], *("" if time is None else f"{time / base:.3f}" for time in times)])
    header = ["case, over the base layer", *(name.removeprefix("ours_") for name in names)]
    return _table(header, rows) if rows else []


def _goals(found: Iterable[Verdict]) -> list[str]:
    """The worst of the measured cases beside each bound."""
    rows = []
    for verdict in found:
        goal = verdict.goal
        shape = "all" if goal.shape is None else "{} -> {}".format(*goal.shape)
        bound = f"{'at most' if goal.at_most else 'at least'} {_number(goal.limit)}"
        outcome = {None: "not measured", True: "met", False: "**not met**"}[verdict.met]
        worst = "" if verdict.worst is None else _number(verdict.worst)
        rows.append([goal.title, shape, bound, worst, verdict.cases, outcome, verdict.worst_case])
    return _table(["goal", "shape", "bound", "worst", "cases", "outcome", "worst case"], rows)


def _losses(done: Sequence[Record]) -> list[str]:
    """Cases in which another provider is faster, the largest gap first."""
    rows = []
    for record in done:
        gap = over_fastest_other(record)
        if gap is not None and gap > 1:
            name, other = fastest_other(record)
            rows.append([gap, record["name"], f"{name} {other:.4f}", f"{median(record, OURS):.4f}", f"{gap:.3f}"])
    if not rows:
        return ["None of the measured cases."]
    rows.sort(key=lambda row: -row[0])
    return _table(["case", "fastest other, ms", "ours, ms", "ours over it"], [row[1:] for row in rows])


def _family(family: str, title: str, done: Sequence[Record]) -> list[str]:
    """All providers of all cases of a family, one row each, the fastest first; a case is named in its first row."""
    rows = []
    for record in done:
        if record["family"] != family:
            continue
        base = median(record, BASE)
        timed = [(name, entry) for name, entry in record["providers"].items() if "median_ms" in entry]
        for i, (name, entry) in enumerate(sorted(timed, key=lambda pair: pair[1]["median_ms"])):
            interval = f"{entry['p10_ms']:.4f} to {entry['p90_ms']:.4f}"
            peak = "" if entry.get("peak_mib") is None else f"{entry['peak_mib']:.0f}"
            over = "" if base is None else f"{entry['median_ms'] / base:.3f}"
            roof = f"{entry['roof_percent']:.0f} %" if "roof_percent" in entry else ""
            times = [f"{entry['median_ms']:.4f}", interval, f"{entry['host_ms']:.3f}"]
            rows.append(["" if i else record["name"], name, *times, roof, peak, over])
    if not rows:
        return []
    header = ["case", "provider", "median, ms", "10 to 90 %", "host, ms", "of the roof", "peak, MiB", "over base"]
    return [f"## {title}", "", *_table(header, rows)]


def _faults(finished: Sequence[Record]) -> list[str]:
    """Everything that was not timed and the reason, once per reason and provider."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in finished:
        if record["status"] == "failed":
            reasons["the whole case", record["error"]].append(record["name"])
        for name, entry in record["providers"].items():
            for fault in FAULTS:
                if fault in entry:
                    reasons[name, f"{fault}: {entry[fault]}"].append(record["name"])
    if not reasons:
        return ["Everything was timed."]
    rows = [[name, reason, len(cases), cases[0]] for (name, reason), cases in reasons.items()]
    return _table(["provider", "reason", "cases", "first case"], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 0.01 else f"{value:.3f}"


def _range(values: Iterable[float]) -> str:
    found = [f"{value:.0f}" for value in sorted(values)]
    low, high = found[0], found[-1]
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    run(main)
