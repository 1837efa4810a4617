"""The numbers of a run, line by line in one file beside its collection, so that people can watch it and look back.

Each line is JSON: ``{"update": 40, "seconds": 61.2, "phase": "anchoring", "values": {"loss": ...}}``, means over the updates since
the line before.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from clora.errors import CloraError
from clora.files import write_atomic

HISTORY = "history.jsonl"


class Record(NamedTuple):
    """What was measured up to an update.

    Attributes:
        update: the last one that counts.
        seconds: of training up to it.
        phase: ``anchoring`` or ``matching``.
        values: name to the mean over the updates since the record before; without those that are not finite.
    """

    update: int
    seconds: float
    phase: str
    values: Mapping[str, float]


class History:
    """Writes the records of a run.

    Args:
        file: that of the run before is continued.
        update: where the run begins. Records after it are dropped, since it measures them again; 0 begins anew.
        every: updates of a record.

    Raises:
        CloraError: the file is not a history.
    """

    def __init__(self, file: Path, update: int = 0, every: int = 10):
        self.file = file
        self.every = every
        records = [record for record in read_history(file) if record.update <= update]
        write_atomic(file, "".join(map(_line, records)))
        self._start = time.monotonic() - (records[-1].seconds if records else 0.0)
        self._last = 0, ""
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, update: int, phase: str, values: Mapping[str, float]) -> list[Record]:
        """Takes the values of an update; returns the records that it writes, where ``every`` updates are full or the phase ends."""
        written = self.flush() if self._last[1] not in ("", phase) else []
        self._last = update, phase
        for name, value in values.items():
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        return written + (self.flush() if update % self.every == 0 else [])

    def flush(self) -> list[Record]:
        """Writes a record of the updates that have none yet, if there are any; returns it."""
        if not self._sums:
            return []
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        # A line that a lost machine cuts off is passed over by the reader.
        record = Record(self._last[0], time.monotonic() - self._start, self._last[1], means)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        return [record]


def read_history(file: Path) -> list[Record]:
    """Reads the records of a run, none where there is no file; a last line that was cut off is passed over.

    Raises:
        CloraError: another line is not a record.
    """
    if not file.exists():
        return []
    lines = file.read_text("utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            values = {str(name): float(value) for name, value in found["values"].items()}
            records.append(Record(int(found["update"]), float(found["seconds"]), str(found["phase"]), values))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):
                break
            raise CloraError(
                f"{file}, line {number}: expected a record of a run, found {line[:60]!r}; remove the line"
            ) from error
    return records


def _line(record: Record) -> str:
    rounded = {name: float(f"{value:.6g}") for name, value in record.values.items()}
    return json.dumps(record._replace(seconds=round(record.seconds, 1), values=rounded)._asdict()) + "\n"
