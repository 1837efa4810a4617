"""Timing of calls by the events of a GPU: caches flushed, providers taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
Stopwatch = Callable[[Call], tuple[float, float]]
"""Times one call: milliseconds on the device, and those for which the host was busy with it."""
UNFINISHED = 4
"""Exit code of a command whose time ended before its work; it goes on when it is called again."""
MIN_FLUSH_BYTES = 1 << 30
"""At least this much is written before each call: 0.25 ms at 4.3 TB/s (not measured), in which the host enqueues the
call's first launches, so that it is ahead of the GPU as it is within a training step."""


def countdown(seconds: float, clock: Callable[[], float] = time.monotonic) -> Callable[[], float]:
    """A function that returns how many of the seconds are left."""
    end = clock() + seconds
    return lambda: end - clock()


class CudaStopwatch:
    """Time between two events around a call on an idle GPU whose L2 cache was overwritten.

    Where the host needs longer for a call's launches than the GPU for them and the flush, the GPU's waiting counts.
    """

    def __init__(self, device: torch.device):
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, MIN_FLUSH_BYTES)
        self._buffer = torch.empty(size, dtype=torch.int8, device=device)

    def flush(self) -> None:
        """Waits for the GPU, then overwrites its L2 cache."""
        torch.cuda.synchronize()
        self._buffer.zero_()

    def __call__(self, call: Call) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        begun = time.perf_counter()
        call()
        busy = (time.perf_counter() - begun) * 1e3
        end.record()
        end.synchronize()
        return start.elapsed_time(end), busy


def interleave(calls: Mapping[str, Call], stopwatch: Stopwatch, rounds: int, warmup: int) -> dict[str, dict]:
    """Times every call once per round, each round beginning with another one, after `warmup` untimed rounds.

    Returns:
        per call `spread` of its device times, with ``host_ms``, the median time for which the host was busy.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(warmup + rounds):
        # Rotated, so that no provider always follows the same one.
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            sample = stopwatch(calls[name])
            if turn >= warmup:
                samples[name].append(sample)
    figures = {}
    for name, pairs in samples.items():
        device, host = zip(*pairs, strict=True)
        figures[name] = {**spread(device), "host_ms": statistics.median(host), "rounds": len(pairs)}
    return figures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, interpolated."""
    if len(values) == 1:
        return {"median_ms": values[0], "p10_ms": values[0], "p90_ms": values[0]}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median_ms": statistics.median(values), "p10_ms": tenths[0], "p90_ms": tenths[-1]}


class GpuStamp:
    """A moment on the GPU; the difference of two is in seconds and waits for the later one.

    As pytest-benchmark's timer, which is called before and after, it measures times on the GPU.
    """

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: GpuStamp) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3
