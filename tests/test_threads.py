"""Threads that wait do not spin for long: libgomp itself reports what it has read in each process that clora starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  (loads the OpenMP that it carries)

from clora import threads

ROOT = Path(__file__).resolve().parents[1]
HAS_LIBGOMP = sys.platform == "linux" and "libgomp" in Path("/proc/self/maps").read_text()
STARTS = {
    "the command": ["-m", "clora", "inspect", "missing"],
    "the benchmarks": ["-c", "import bench.records, torch"],
    "the tests": ["tests/conftest.py"],
}


def settings_of_libgomp(start, **given):
    """The settings that libgomp prints while it is loaded, by name."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    run = subprocess.run(
        [sys.executable, *STARTS[start]],
        env=inherited | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)} | given,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return dict(re.findall(r"^ +(?:\[\w+\] )?(\w+) = '(.*)'$", run.stderr, re.MULTILINE))


@pytest.mark.skipif(not HAS_LIBGOMP, reason="torch's OpenMP is not libgomp here")
@pytest.mark.parametrize(
    ("start", "given", "expected"),
    [
        *((start, {}, threads.SPINS) for start in STARTS),
        ("the command", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("the command", {"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_libgomp_is_loaded_after_the_setting_and_a_users_own_stays(start, given, expected):
    assert settings_of_libgomp(start, **given)["GOMP_SPINCOUNT"] == expected


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    threads.limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
