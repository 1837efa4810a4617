"""Fixtures of the benchmarks under pytest: the gate before each, and the GPU's clock."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from bench import gate
from bench.cases import CASES, cpu_cases
from bench.measure import family_of, prepare
from bench.providers import BASE, Unavailable
from bench.timing import CudaStopwatch

prepare_once = lru_cache(maxsize=1)(prepare)  # kept while the providers of a case take their turns


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="on a GPU: every case, for hours, not only the telling ones")


def pytest_generate_tests(metafunc):
    """One test per case and provider."""
    cases = {"cpu_case": cpu_cases, "gpu_case": CASES["every" if metafunc.config.getoption("--all") else "telling"]}
    for name, make in cases.items():
        if name in metafunc.fixturenames:
            sets = [(case, provider) for case in make() for provider in family_of(case).providers(case)]
            metafunc.parametrize((name, "provider"), sets, ids=[f"{case.name}-{provider}" for case, provider in sets])


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
