"""The fastest designs of every measured shape, for `csrc_triton/multi_lora/designs.py`.

`python -m bench.design_table FOLDER` replaces the entries of that GPU and Triton release in `designs.json`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import log

from bench import records
from bench.arguments import Parser, run
from bench.goals import Record, median
from bench.machine import ROOT
from bench.report import measured_folder
from csrc_triton.multi_lora.designs import gpu_device

TABLE = ROOT / "csrc_triton" / "multi_lora" / "designs.json"
KEYS = ("device", "triton", "dtype", "in_features", "out_features", "rank")
Shape = tuple[str, str, str, int, int, int]
"""The values of `KEYS`."""
Logs = dict[int, list[float]]
"""By tokens or rows, logarithms of the ratio of two designs' times."""


def entries_of(found: Iterable[Record]) -> list[dict]:
    """Entries as `designs` reads them, from the forward cases in which the designs were timed.

    The number of samples must not matter to the choice: cases that differ only in it count together, by the geometric
    mean of the ratio of two designs' times.
    """
    exact: dict[Shape, Logs] = defaultdict(lambda: defaultdict(list))
    merging: dict[Shape, Logs] = defaultdict(lambda: defaultdict(list))
    for record in found:
        case = record["case"]
        fused, split, merged = (median(record, f"ours_{design}") for design in ("fused", "split", "merged"))
        if not (_is_forward(record) and fused and split):
            continue
        gpu = gpu_device(record["machine"]["capability"], record["machine"]["triton"])
        shape = (gpu.name, gpu.triton, *(case[key] for key in KEYS[2:]))
        exact[shape][case["tokens"]].append(log(fused / split))
        if merged:
            rows = case["samples"] // case["adapters"] * case["tokens"]
            merging[shape][rows].append(log(merged / min(fused, split)))
    entries = []
    for shape in sorted(exact):
        found_here = [*_faster_exact(exact[shape]), *_rows_to_merge(merging[shape])]
        entries += [dict(zip(KEYS, shape, strict=True)) | entry for entry in found_here]
    return entries


def _is_forward(record: Record) -> bool:
    """Tests whether a case is about a frozen adapter's forward pass, with factors in the layer's dtype."""
    case = record["case"]
    is_linear = record["family"] in ("LinearCase", "DesignCase") and case["mode"] == "forward"
    return is_linear and case.get("factors", case["dtype"]) == case["dtype"]


def _faster_exact(logs: Logs) -> list[dict]:
    """The faster of fused and split by increasing tokens; an entry holds up to the next one, and equal neighbours are one."""
    entries: list[dict] = []
    for tokens, ratios in sorted(logs.items()):
        # A sum of logs <= 0 is a geometric mean <= 1.
        design = "fused" if sum(ratios) <= 0 else "split"
        if not entries or entries[-1]["design"] != design:
            entries.append({"min_tokens": tokens, "design": design})
    return entries


def _rows_to_merge(logs: Logs) -> list[dict]:
    """The least measured rows of an adapter from which, as far as was measured, merged is the fastest; None for never."""
    least = None
    for rows, ratios in sorted(logs.items(), reverse=True):
        if sum(ratios) > 0:
            break
        least = rows
    return [{"min_rows": least, "design": "merged"}] if logs else []


def merged(earlier: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """The measurements with those of other devices and Triton releases kept."""
    replaced = [(entry["device"], entry["triton"]) for entry in new]
    return [entry for entry in earlier if (entry["device"], entry["triton"]) not in replaced] + list(new)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table from the records of a folder; exits with 1 where they hold no shape with both designs."""
    parser = Parser("bench.design_table", __doc__.splitlines()[0])
    parser.add_argument("folder", type=measured_folder, help="of a GPU's records, such as bench/results/<gpu>")
    new = entries_of(records.read_all(parser.parse_args(argv).folder))
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
    run(main)
