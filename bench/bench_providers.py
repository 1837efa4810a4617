"""Every provider under pytest-benchmark: small cases on the CPU, the telling ones on a GPU.

For a look at one provider; the figures of record, for which providers take turns, are those of `python -m bench.run`.
"""

from __future__ import annotations

import pytest
import torch

from bench.cases import cpu_cases, telling_cases
from bench.measure import family_of
from bench.timing import GpuStamp


def with_providers(cases):
    """One parameter set per case and provider."""
    return [
        pytest.param(case, provider, id=f"{case.name}-{provider}")
        for case in cases
        for provider in family_of(case).providers(case)
    ]


@pytest.mark.parametrize(("case", "provider"), with_providers(cpu_cases()))
def test_cpu(case, provider, time_provider):
    if "compiled" in provider:
        pytest.skip("compiled providers are timed on GPUs only")
    time_provider(case, provider, torch.device("cpu"), rounds=10)


@pytest.mark.gpu
@pytest.mark.benchmark(timer=GpuStamp)
@pytest.mark.parametrize(("case", "provider"), with_providers(telling_cases()))
def test_gpu(case, provider, gpu, time_provider):
    time_provider(case, provider, gpu, rounds=20)
