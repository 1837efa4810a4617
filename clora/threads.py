"""torch's threads on the CPU: how long they spin for each other before they sleep, and how many a training takes."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Set
from contextlib import suppress
from pathlib import Path

# libgomp's default is 300000: milliseconds, on a core that another process may need. Lower counts gain more beside a busy
# process on some machines, but at 1000 an idle machine loses a tenth of its updates.
SPINS = "10000"
SAMPLE_SECONDS = 0.5
"""In which the busy cores are counted; the system counts in hundredths of a second. The load average would count this
process's own work of the last minute, and that on cores it may not use."""
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
STAT = Path("/proc/stat")
CORES = Path("/sys/devices/system/cpu")


def limit_spinning() -> None:
    """Limits the spinning of libgomp, the OpenMP of torch on Linux, unless the user has set how threads wait.

    Two threads that spin for each other beside any busy process waste most of their time. libgomp reads the variable
    when it is loaded, so this has no effect after ``import torch``.
    """
    if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def choose_threads(current: int, before: int | None = None) -> tuple[int, str]:
    """Chooses the threads of a training.

    Args:
        current: torch's number: its default, or what the user has set, which stays.
        before: of the run's checkpoint, taken again where it is possible.

    Returns:
        The number, and a line for the user; it is empty where a run begins with the user's number, or torch's.
    """
    cores = usable_cores()
    if is_users(current, cores):
        return current, "" if before is None else _resumed(current, before)
    quota = cpu_quota()
    possible = _within(quota, current)
    if before is not None:
        number = min(before, possible)
        return number, _resumed(number, before)
    busy = busy_cores(cores)
    number = possible if busy is None else max(1, min(possible, len(cores) - round(busy)))
    if busy is None and number == current:
        return number, ""
    limits = "" if busy is None else f", {round(busy)} busy"
    limits += "" if quota is None else f", a quota of {quota:g}"
    return (
        number,
        f"training runs on {_threads(number)} ({len(cores)} cores{limits}; OMP_NUM_THREADS sets another number)",
    )


def _within(quota: float | None, threads: int) -> int:
    return threads if quota is None else max(1, min(threads, math.ceil(quota)))


def _resumed(number: int, before: int) -> str:
    if number == before:
        return f"training runs on {_threads(number)}, as before"
    return f"training runs on {_threads(number)}; it ran on {before} before: the last digits may differ from here on"


def _threads(number: int) -> str:
    return f"{number} thread" if number == 1 else f"{number} threads"


def is_users(current: int, cores: Set[int]) -> bool:
    """Reports whether the user has set torch's number of threads, by the environment or in this process.

    Args:
        current: torch's number. Its default is the number of physical cores, or of all in builds without MKL.
        cores: that this process may use.
    """
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        return True
    siblings = set()
    for core in cores:
        file = CORES / f"cpu{core}/topology/thread_siblings_list"
        siblings.add(file.read_text() if file.exists() else str(core))
    return current not in (len(cores), len(siblings))


def usable_cores() -> Set[int]:
    """Returns the numbers of the (logical) cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_quota() -> float | None:
    """Returns the cores' time that the control groups of this process may take, in cores; None for no limit."""
    quotas = []
    for folder in _own_groups():
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, ValueError):  # not there, or "max"
                quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
                quotas.append(quota / period if quota > 0 else math.inf)  # -1 is no limit in version 1
    least = min(quotas, default=math.inf)
    return None if least == math.inf else least


def _own_groups() -> Iterator[Path]:
    """Yields the folders of this process's groups and of those around them, which limit it too.

    In a container the paths may be the host's; what limits it is then in the topmost folder.
    """
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            own = Path(path.strip("/"))
            for root in (CGROUPS / controllers, CGROUPS / "cpu") if controllers else (CGROUPS,):
                yield from (root / group for group in (own, *own.parents))


def busy_cores(cores: Set[int]) -> float | None:
    """Measures how many cores' time other processes take; None where the system does not report it.

    Args:
        cores: whose time counts.
    """
    with suppress(OSError, ValueError, IndexError):
        before, own, start = _busy_seconds(cores), time.process_time(), time.monotonic()
        time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - start
        others = _busy_seconds(cores) - before - (time.process_time() - own)
        return min(max(others / seconds, 0.0), float(len(cores)))
    return None


def _busy_seconds(cores: Set[int]) -> float:
    """The time that these cores have spent on anything, other guests of the same machine included."""
    names = {f"cpu{core}" for core in cores}
    lines = [line.split() for line in STAT.read_text().splitlines()]
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user.
    ticks = [int(value) for name, *values in lines if name in names for value in (*values[:3], *values[5:8])]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")
