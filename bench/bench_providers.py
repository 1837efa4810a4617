"""Every provider under pytest-benchmark: small cases on a CPU, on a GPU the telling ones, or with `--all` every one.

The figures of record, for which providers take turns, are those of `python -m bench.gpu`.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import GpuStamp


def test_cpu(cpu_case, provider, time_provider):
    if "compiled" in provider:
        pytest.skip("compiled providers are timed on GPUs only")
    time_provider(cpu_case, provider, torch.device("cpu"), rounds=10)


@pytest.mark.gpu
@pytest.mark.benchmark(timer=GpuStamp)
def test_gpu(gpu_case, provider, gpu, time_provider):
    time_provider(gpu_case, provider, gpu, rounds=20)
