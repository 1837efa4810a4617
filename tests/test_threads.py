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


STAT = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 {} 0 0 100 50 0 0 0 7 0\ncpu1 0 0 0 0 0 0 0 {} 0 0\ncpu2 {} 0 0 0 0 0 0 0 0 0\nintr 5\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of no files, without limits and with nothing of the user's."""
    for name in ("CGROUPS", "OWN_CGROUPS", "STAT", "CORES"):
        monkeypatch.setattr(threads, name, tmp_path / name)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: set(range(8)))
    return tmp_path


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n", "cpu.max": "800000 100000\n"}, 4),
        ("0::/of/the/host", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "1:name=systemd:/\n4:cpu,cpuacct:/a",
            {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "50000\n"},
            4,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("5:cpuset:/\n0::/", {}, None),
        (None, {"cpu.max": "50000 100000\n"}, None),
    ],
)
def test_the_quota_is_the_least_of_the_groups_around(machine, own, limits, expected):
    if own is not None:
        (machine / "OWN_CGROUPS").write_text(own + "\n")
    for name, text in limits.items():
        file = machine / "CGROUPS" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert threads.cpu_quota() == expected


def test_what_other_processes_do_on_the_cores_of_this_one_is_busy(machine, monkeypatch):
    """Half a second of user time and one of the host's on two cores; .25 s are this process's, and core 2 is not its."""
    assert threads.busy_cores({0, 1}) is None, "there is no such file"
    (machine / "STAT").write_text(STAT.format(10, 0, 0))
    times = {"monotonic": iter([0.0, 2.0]), "process_time": iter([0.0, 0.25])}
    monkeypatch.setattr(threads.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(times["monotonic"]))
    monkeypatch.setattr(threads.time, "process_time", lambda: next(times["process_time"]))
    monkeypatch.setattr(threads.time, "sleep", lambda _: (machine / "STAT").write_text(STAT.format(60, 100, 500)))
    assert threads.busy_cores({0, 1}) == pytest.approx((0.5 + 1.0 - 0.25) / 2)


@pytest.mark.parametrize(
    ("current", "busy", "quota", "before", "expected"),
    [
        (8, 0.0, None, None, 8),
        (8, 2.6, None, None, 5),
        (8, 8.0, None, None, 1),
        (8, 0.0, 2.5, None, 3),
        (8, 0.0, 0.2, None, 1),
        (8, 4.0, 2.0, None, 2),
        (8, None, None, None, 8),
        (8, None, 2.0, None, 2),
        (8, 7.0, None, 4, 4),
        (8, 0.0, 3.0, 4, 3),
        (3, 7.0, None, None, 3),  # the user's: neither all cores nor the physical ones
        (3, 7.0, None, 4, 3),
    ],
)
def test_threads_are_what_is_free_and_never_more_than_torch_s(
    machine, monkeypatch, current, busy, quota, before, expected
):
    monkeypatch.setattr(threads, "busy_cores", lambda cores: busy)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    number, line = threads.choose_threads(current, before)
    assert number == expected
    assert not line or line.startswith(f"training runs on {number} thread")
    is_measured = current == 8 and (busy is not None or quota is not None)
    assert bool(line) == (is_measured or before is not None)


def test_a_user_s_number_stays(machine, monkeypatch):
    monkeypatch.setattr(threads, "busy_cores", lambda cores: 7.0)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "8")
            assert threads.choose_threads(8) == (8, "")
            assert threads.choose_threads(8, 8) == (8, "training runs on 8 threads, as before")
            assert "it ran on 2 before" in threads.choose_threads(8, 2)[1]
    for core in range(8):
        topology = machine / "CORES" / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    assert threads.choose_threads(4)[0] == 1, "torch's default, the physical cores"
    assert threads.choose_threads(5) == (5, "")


def test_this_machine_is_read():
    cores = threads.usable_cores()
    busy, quota = threads.busy_cores(cores), threads.cpu_quota()
    assert cores
    assert busy is None or 0 <= busy <= len(cores)
    assert quota is None or quota > 0
