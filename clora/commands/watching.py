"""A run that people can watch: its numbers are kept, and its report is written anew while it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from clora.commands.tracking import Log
from clora.devices import peak_memory_gb
from clora.report.history import HISTORY, History
from clora.report.run_report import write_run_report
from clora.training.trainer import Report

REPORT_SECONDS = 30.0
"""Least time between two reports."""


@contextmanager
def watched(output: Path, first: int, device: torch.device, show: Report, log: Log) -> Iterator[Report]:
    """Yields a report for `train_student` that keeps the numbers in ``history.jsonl`` and writes ``report.html`` anew.

    Args:
        output: the run's folder.
        first: update that the run goes on from.
        device: that of the transformer, whose memory counts.
        show: called too, for the bar.
        log: called for each record.
    """
    output.mkdir(parents=True, exist_ok=True)
    history = History(output / HISTORY, first)
    written = time.monotonic()

    def report(update: int, values: Mapping[str, float]) -> None:
        nonlocal written
        phase = "matching" if "critic" in values else "anchoring"
        for record in history.add(update, phase, {**values, "memory_gb": peak_memory_gb(device)}):
            log(record.update, record.values)
        show(update, values)
        if time.monotonic() - written >= REPORT_SECONDS:
            write_run_report(output)
            written = time.monotonic()

    try:
        yield report
    finally:
        for record in history.flush():
            log(record.update, record.values)
        if (output / HISTORY).stat().st_size:
            write_run_report(output)
