"""An update of the studio's demo on a CPU: time against another commit's, time and memory by `train.gradient_rows`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import machine, records
from bench.arguments import RESULTS, Parser, run, whole
from bench.machine import ROOT
from clora.errors import CloraError

WORKER = ROOT / "bench" / "update_worker.py"
ROWS: tuple[int | None, ...] = (1, 3, 4, None)
KINDS = ("anchoring", "matching")
CLOCK = "processor time of one thread, sides in turns; medians, ratios within a round"


class Side:
    """A process that makes an update when it is asked for one.

    Args:
        checkout: the tree whose `clora` it imports.
        arguments: of the worker.

    Raises:
        CloraError: the process ended by itself, here or in `update`.
    """

    def __init__(self, checkout: Path, arguments: Sequence[str]):
        self.updates: list[dict] = []
        self._checkout = checkout
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            cwd=checkout,
            # One thread, so that the processor's time is that of the work.
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def update(self) -> None:
        """Makes an update."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as _read finds
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        self._read()

    def end(self) -> dict:
        """Ends the process; returns the median time of its updates but the first, its peak and first losses."""
        self._process.communicate()
        seconds = [update["seconds"] for update in self.updates[1:]]
        return {
            "seconds": statistics.median(seconds),
            "rounds": seconds,
            "peak_mib": self.updates[-1]["peak_mib"],
            "first_losses": self.updates[0]["losses"],
        }

    def kill(self) -> None:
        """Ends the process at once, if it has not ended."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self.updates.append(json.loads(line))
                return
        code = self._process.wait()
        raise CloraError(
            f"expected updates from {self._checkout}, found that {WORKER.name} has ended there with {code}; "
            "mend what it has printed, or free memory if it was killed (-9), and measure again"
        )


def in_turns(sides: dict[str, tuple[Path, list[str]]], rounds: int) -> dict[str, dict]:
    """Measures sides update by update, in turns; every other round begins with the last. The first's ratio is 1."""
    running: dict[str, Side] = {}
    with contextlib.ExitStack() as stack:
        for name, side in sides.items():
            running[name] = Side(*side)
            stack.callback(running[name].kill)
        for turn in range(rounds):
            for one in list(running.values())[:: -1 if turn % 2 else 1]:
                one.update()
        found = {name: one.end() for name, one in running.items()}
    base = next(iter(found.values()))
    for entry in found.values():
        entry["ratio"] = statistics.median(a / b for a, b in zip(entry["rounds"], base["rounds"], strict=True))
        entry["memory"] = entry["peak_mib"] / base["peak_mib"] if base["peak_mib"] else None
    return found


def checkout(text: str) -> Path:
    """Reads the folder of a checkout of clora."""
    if not Path(text, "clora", "__init__.py").is_file():
        found = f"found no clora/__init__.py in {text!r}; make one by git worktree add FOLDER COMMIT"
        raise argparse.ArgumentTypeError(f"expected a checkout of clora, {found}")
    return Path(text).resolve()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the figures and prints them."""
    parser = Parser("bench.update", __doc__.splitlines()[0])
    parser.add_argument("--against", type=checkout, help="another checkout, such as a worktree of an earlier commit")
    parser.add_argument("--rounds", type=whole(), default=12, help="timed updates of each side")
    parser.add_out(RESULTS / "cpu")
    arguments = parser.parse_args(argv)
    file = parser.out(arguments, "rounds") / "update.json"
    record = {"conditions": {}} | (records.read(file) or {})
    host = machine.describe_host()
    if arguments.against is not None:
        for kind in KINDS:
            sides = {
                machine.commit(arguments.against): (arguments.against, [kind]),
                "ours, no bound": (ROOT, [kind]),
                "ours, 3 rows": (ROOT, [kind, "--rows", "3"]),
            }
            record[kind] = in_turns(sides, arguments.rounds)
            record["conditions"][kind] = {"clock": CLOCK, **host}
    else:
        sides = {"three copies": (ROOT, ["matching", "--peers", "--adamw"])}
        for rows in ROWS:
            sides[f"ours, {rows or 'all'} rows"] = (ROOT, ["matching", "--adamw", "--rows", json.dumps(rows)])
        record["rows"] = in_turns(sides, arguments.rounds)
        record["conditions"]["rows"] = {"clock": CLOCK, **host}
    records.write(file, record)
    for part in (*KINDS, "rows"):
        for name, entry in record.get(part, {}).items():
            print(f"{part}: {name}: {entry['seconds']:.3f} s, {entry['ratio']:.2f}; {entry['peak_mib']:.0f} MiB")
    return 0


if __name__ == "__main__":
    run(main)
