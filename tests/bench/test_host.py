"""The time of the host: calls run in the mode of a pass, which is no part of what is timed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench import host


def test_only_what_learns_is_timed_with_gradients(monkeypatch):
    monkeypatch.setattr(host, "CALLS", 2)
    modes = {}
    calls = {}
    for name in ("fused: one layer", f"fused: {host.STUDENT}"):
        calls[name] = lambda name=name: modes.setdefault(name, []).append(torch.is_grad_enabled())
    found = host.microseconds(calls, rounds=1)
    assert list(found) == list(calls)
    assert modes == {"fused: one layer": [False] * 4, f"fused: {host.STUDENT}": [True] * 4}
