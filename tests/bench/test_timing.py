"""Turns, percentiles and the clocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.timing import CudaStopwatch, countdown, interleave, spread


def test_providers_take_turns_and_each_begins_a_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    figures = interleave(calls, lambda call: (call() or 1.0, 0.5), rounds=3, warmup=1)
    assert "".join(order) == "abcbcacababc"
    assert {name: entry["rounds"] for name, entry in figures.items()} == {"a": 3, "b": 3, "c": 3}
    assert interleave({}, None, rounds=3, warmup=1) == {}


def test_warmup_is_not_counted():
    times = iter([100.0, 1.0, 3.0])
    figures = interleave({"a": lambda: None}, lambda call: (next(times), 0.5), rounds=2, warmup=1)
    assert figures["a"]["median_ms"] == 2.0
    assert figures["a"]["host_ms"] == 0.5


def test_spread():
    assert spread(range(11)) == {"median_ms": 5, "p10_ms": 1.0, "p90_ms": 9.0}
    assert spread([4.0]) == {"median_ms": 4.0, "p10_ms": 4.0, "p90_ms": 4.0}


def test_countdown():
    now = [5.0]
    left = countdown(10.0, lambda: now[0])
    now[0] = 12.0
    assert left() == 3.0


@pytest.fixture
def log(monkeypatch):
    """Commands that a GPU would get, in order; events are a second apart."""
    entries = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            entries.append("event")
            self.at = entries.count("event")

        def synchronize(self):
            entries.append("wait for event")

        def elapsed_time(self, later):
            return 1000.0 * (later.at - self.at)

    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: entries.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return entries


def test_a_call_is_timed_on_an_idle_gpu_with_a_flushed_cache(log, monkeypatch):
    monkeypatch.setattr("bench.timing.MIN_FLUSH_BYTES", 4)
    stopwatch = CudaStopwatch(torch.device("cpu"))
    assert stopwatch._buffer.nbytes == 120 << 20
    stopwatch._buffer = SimpleNamespace(zero_=lambda: log.append("flush"))
    milliseconds, host = stopwatch(lambda: log.append("call"))
    assert log == ["wait", "flush", "event", "call", "event", "wait for event"]
    assert milliseconds == pytest.approx(1000.0)
    assert 0 <= host < 1000
