"""Every case under pytest: small ones on a CPU, on a GPU the telling ones, or with `--all` every one."""

from __future__ import annotations

import torch

from bench import records
from bench.measure import measure, release
from bench.providers import is_ours


def test_case(case, bench, measured, monkeypatch):
    """Ours is within twice eager's error, and everything else that runs is timed beside it."""
    if bench.device.type == "cuda":
        monkeypatch.setenv("CLORA_BACKEND", "triton")  # so that ours fails where it would fall back to eager
    record = records.begin(case, "", [], None)
    measure(case, bench, record, lambda: None)
    if torch.cuda.is_available():
        release()
    measured.append(record)
    assert record["status"] == "done", record["error"]
    faults = {name: entry for name, entry in record["providers"].items() if is_ours(name) and "median_ms" not in entry}
    assert all("unavailable" in entry for entry in faults.values()), faults
