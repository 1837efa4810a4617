"""The JSON of a case: written before, during and after its measurement, so that a run can stop at any moment.

A record's status is "running" (being measured, or the run was stopped), "done" or "failed" (nothing of the case could be
timed); "current" is the provider or step that a running one is at. A provider's entry holds its times, or one of "wrong"
(the gate), "failed" and "unavailable" with the reason.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from bench.cases import Case
from clora.files import write_atomic

STEPS = ("inputs", "timing")
"""Places of a measurement outside any provider: making inputs and truth, and timing all providers that passed."""
MAX_STOPS = 2
"""After this many ends at the same provider, a case is measured without it: it may hang or crash."""


def path_of(folder: Path, case: Case) -> Path:
    return folder / f"{case.name}.json"


def write(path: Path, record: dict) -> None:
    """Writes a record whole or not at all."""
    write_atomic(path, json.dumps(record, indent=1) + "\n")


def read(path: Path) -> dict | None:
    """A record; None where there is none or it is not a JSON object."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_all(folder: Path) -> list[dict]:
    """The records of cases in a folder, by name."""
    records = [read(path) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if record is not None and "family" in record]


def is_finished(record: dict | None, revision: str, designs: list[str]) -> bool:
    """Tests whether a case need not be measured again at this revision, with these designs of its layers."""
    if record is None or record["status"] == "running":
        return False
    return record["revision"] == revision and record["designs"] == designs


def begin(case: Case, revision: str, designs: list[str], earlier: dict | None) -> dict:
    """The record of a measurement that starts now.

    Args:
        designs: those that the table chooses for its layers.
        earlier: the record of an earlier process. If that ended within the case at the same revision, its faulty providers
            are kept, so that they are not tried again; so is the count of ends by place.
    """
    record = {
        "name": case.name,
        "family": type(case).__name__,
        "case": asdict(case),
        "revision": revision,
        "designs": designs,
        "status": "running",
        "current": None,
        "stopped": {},
        "providers": {},
    }
    if earlier is None or earlier["revision"] != revision or earlier["status"] != "running":
        return record
    # The earlier process ended within this case: count its end at the place where it was.
    record["providers"] = {name: entry for name, entry in earlier["providers"].items() if "failed" in entry}
    record["stopped"] = stopped = dict(earlier["stopped"])
    place = earlier["current"]
    if place is None or place in record["providers"]:
        return record
    stopped[place] = stopped.get(place, 0) + 1
    if stopped[place] >= MAX_STOPS:
        error = f"the process ended here {stopped[place]} times"
        if place in STEPS:
            record |= {"status": "failed", "error": f"{place}: {error}"}
        else:
            record["providers"][place] = {"failed": error}
    return record
