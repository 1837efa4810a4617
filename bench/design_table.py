"""The forward design of every measured shape, for `csrc_triton/multi_lora/designs.py`.

`python -m bench.design_table FOLDER` replaces the entries of that GPU's compute capability and Triton release in
`designs.json`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import log
from pathlib import Path

from bench import records
from bench.goals import Record, median
from bench.machine import ROOT
from csrc_triton.multi_lora.designs import release

TABLE = ROOT / "csrc_triton" / "multi_lora" / "designs.json"
KEYS = ("capability", "triton", "dtype", "in_features", "out_features", "rank")
Shape = tuple[tuple[int, ...], str, str, int, int, int]
"""The values of `KEYS`."""


def entries_of(found: Iterable[Record]) -> list[dict]:
    """Entries as `design_for` reads them, from the forward cases in which both designs were timed.

    The number of samples must not matter to the choice, so that cases that differ in it alone count together, by the
    geometric mean of fused over split. An entry holds up to the next one of its shape; equal neighbours are one.
    """
    ratios: dict[Shape, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in found:
        fused, split = median(record, "ours_fused"), median(record, "ours_split")
        if record["family"] == "LinearCase" and record["case"]["mode"] == "forward" and fused and split:
            ratios[_shape(record)][record["case"]["tokens"]].append(log(fused / split))
    return [entry for shape in sorted(ratios) for entry in _entries(shape, ratios[shape])]


def merged(earlier: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """The table with the entries of other compute capabilities and Triton releases kept."""
    replaced = [(entry["capability"], entry["triton"]) for entry in new]
    return [entry for entry in earlier if (entry["capability"], entry["triton"]) not in replaced] + list(new)


def main(argv: Sequence[str]) -> int:
    """Writes the table from the records of a folder; exits with 1 where they hold no shape with both designs."""
    new = entries_of(records.read_all(Path(argv[0])))
    if not new:
        print("no case has times of both designs; designs.json is unchanged")
        return 1
    table = merged(json.loads(TABLE.read_text("utf-8")), new)
    rows = ",\n".join(" " + json.dumps(entry) for entry in table)
    TABLE.write_text(f"[\n{rows}\n]\n", "utf-8")
    print(f"{TABLE}: {len(new)} entries of this GPU and Triton, {len(table)} in all")
    return 0


def _shape(record: Record) -> Shape:
    case, machine = record["case"], record["machine"]
    layer = (case["dtype"], case["in_features"], case["out_features"], case["rank"])
    return tuple(machine["capability"]), release(machine["triton"]), *layer


def _entries(shape: Shape, by_tokens: dict[int, list[float]]) -> list[dict]:
    entries = []
    for tokens, logs in sorted(by_tokens.items()):
        design = "fused" if sum(logs) <= 0 else "split"
        if not entries or entries[-1]["design"] != design:
            entry = dict(zip(KEYS, shape, strict=True)) | {"capability": list(shape[0])}
            entries.append(entry | {"min_tokens": tokens, "design": design})
    return entries


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
