"""The faster exact design of every measured shape, for `csrc_triton/multi_lora/designs.py`.

`python -m bench.design_table FOLDER` replaces the entries of that GPU and Triton release in
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
from csrc_triton.multi_lora.designs import gpu_device

TABLE = ROOT / "csrc_triton" / "multi_lora" / "designs.json"
KEYS = ("device", "triton", "dtype", "in_features", "out_features", "rank")
Shape = tuple[str, str, str, int, int, int]
"""The values of `KEYS`."""


def entries_of(found: Iterable[Record]) -> list[dict]:
    """Entries as `designs` reads them, from the forward cases in which both designs were timed.

    The number of samples must not matter to the choice: cases that differ only in it count together, by the geometric
    mean of fused over split. An entry holds up to the next one of its shape; equal neighbours are one.
    """
    ratios: dict[Shape, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in found:
        fused = median(record, "ours_fused")
        split = median(record, "ours_split")
        case = record["case"]
        if record["family"] == "LinearCase" and case["mode"] == "forward" and fused and split:
            gpu = gpu_device(record["machine"]["capability"], record["machine"]["triton"])
            ratios[(gpu.name, gpu.triton, *(case[key] for key in KEYS[2:]))][case["tokens"]].append(log(fused / split))
    # By increasing tokens, an entry wherever the faster design changes. A sum of logs <= 0 is a geometric mean <= 1.
    entries: list[dict] = []
    for shape in sorted(ratios):
        last = None
        for tokens, logs in sorted(ratios[shape].items()):
            design = "fused" if sum(logs) <= 0 else "split"
            if design != last:
                entries.append(dict(zip(KEYS, shape, strict=True)) | {"min_tokens": tokens, "design": design})
            last = design
    return entries


def merged(earlier: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """The measurements with those of other devices and Triton releases kept."""
    replaced = [(entry["device"], entry["triton"]) for entry in new]
    return [entry for entry in earlier if (entry["device"], entry["triton"]) not in replaced] + list(new)


def main(argv: Sequence[str]) -> int:
    """Writes the table from the records of a folder; exits with 1 where they hold no shape with both designs."""
    new = entries_of(records.read_all(Path(argv[0])))
    if not new:
        print("no case has times of both designs; designs.json is unchanged")
        return 1
    table = json.loads(TABLE.read_text("utf-8"))
    measured = merged(table["measured"], new)
    rows = ",\n".join(" " + json.dumps(entry) for entry in measured)
    TABLE.write_text(f'{{\n"precision": {json.dumps(table["precision"])},\n"measured": [\n{rows}\n]\n}}\n', "utf-8")
    print(f"{TABLE}: {len(new)} entries of this GPU and Triton, {len(measured)} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
