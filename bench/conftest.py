"""Fixtures of the benchmarks under pytest: the gate before each, and the GPU's clock."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from bench import gate
from bench.measure import family_of, prepare
from bench.providers import BASE, Unavailable
from bench.timing import CudaStopwatch

prepare_once = lru_cache(maxsize=1)(prepare)  # kept while the providers of a case take their turns


@pytest.fixture
def time_provider(benchmark):
    """Returns time_provider(case, provider, device, rounds): checks the provider, then times it."""

    def run(case, provider, device, rounds):
        inputs, expected, allowed = prepare_once(case, device)
        try:
            call = family_of(case).providers(case)[provider](inputs)
        except Unavailable as reason:
            pytest.skip(str(reason))
        outputs = call()
        # The base computes something else; the gate does not apply to it.
        if provider != BASE:
            assert gate.violation(gate.errors(outputs, expected), allowed) is None
        benchmark.group = case.name
        setup = CudaStopwatch(device).flush if device.type == "cuda" else None
        benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=2)

    return run


@pytest.fixture
def gpu():
    """The first GPU; a test that asks for it is skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)
