"""Random arguments of `multi_lora_linear`, its results and their error, for the tests of its Triton kernels.

Import it after `pytest.importorskip("triton")`.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from csrc_triton import replay
from csrc_triton.multi_lora import launch
from csrc_triton.multi_lora.op import multi_lora_linear_triton
from csrc_triton.multi_lora.reference import multi_lora_linear
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
interpreted = pytest.mark.skipif(
    not INTERPRETED,
    reason="the code of other cases with other constants, which would be compiled: left to the interpreter",
)
FEW = 64
each_design = pytest.mark.parametrize("design", ["fused", "split"])


class Case(NamedTuple):
    """Sizes as in `reference`, and the adapter of each sample."""

    tokens: int
    inputs: int
    outputs: int
    adapters: int
    rank: int
    ids: list[int]


# Kernels are compiled for tiles, and for sizes that are multiples of 16 or not: few of them, which cases share.
CASES = {
    "mixed": Case(70, 40, 70, 3, 20, [2, -1, 0, 0, 1]),  # no size is a multiple of its tile
    "one_token": Case(1, 33, 17, 2, 4, [1, -1, 0]),
    "one_sample": Case(9, 16, 24, 1, 16, [0]),
    "unused_adapters": Case(4, 33, 17, 6, 4, [5, 5]),
    "all_base": Case(3, 33, 17, 2, 4, [-1, -1]),
    "all_one_adapter": Case(65, 40, 70, 1, 20, [0, 0, 0]),
    "several_rank_blocks": Case(5, 20, 30, 2, 200, [1, 0]),
    "several_chunks": Case(1100, 16, 70, 2, 2, [1, -1]),  # 18 row tiles a sample: more than a group of them
    "empty_batch": Case(3, 4, 5, 2, 2, []),
    "no_tokens": Case(0, 4, 5, 2, 2, [1, 0]),
}
LARGE = {
    "aligned": Case(300, 256, 512, 4, 64, [3, -1, 0, 3]),
    "wide_rank": Case(1500, 512, 320, 2, 256, [1, 0]),
    "model": Case(1024, 3072, 3072, 3, 128, [2, -1, 0]),
}


def make(case: Case, dtype=torch.float32, factor_dtype=None, bias=True, seed=0):
    """Arguments of the op on the device; factors in fp32 over a 16-bit base by default, as the bank keeps them."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE, dtype)

    factor_dtype = torch.float32 if factor_dtype is None else factor_dtype
    return [
        rand(len(case.ids), case.tokens, case.inputs),
        rand(case.outputs, case.inputs, scale=case.inputs**-0.5),
        rand(case.outputs) if bias else None,
        rand(case.adapters, case.rank, case.inputs, dtype=factor_dtype, scale=case.inputs**-0.5),
        rand(case.adapters, case.outputs, case.rank, dtype=factor_dtype, scale=case.rank**-0.5),
        rand(case.adapters, dtype=torch.float32) + 1.5,
        torch.tensor(case.ids, dtype=torch.int64, device=DEVICE),
    ]


POSITIONS = {"x": 0, "A": 3, "B": 4}


def results(function, arguments, upstream, wanted="xAB"):
    """The output as `y` and the gradient of each wanted argument."""
    arguments = list(arguments)
    for name in wanted:
        arguments[POSITIONS[name]] = arguments[POSITIONS[name]].detach().requires_grad_()
    y = function(*arguments)
    leaves = [arguments[POSITIONS[name]] for name in wanted]
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, leaves, upstream.to(y.dtype)), strict=True))


def ours(design):
    return lambda *arguments: multi_lora_linear_triton(*arguments, design)


def upstream_of(arguments, seed=1):
    x, weight = arguments[:2]
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*x.shape[:2], len(weight), generator=g).to(x)


def assert_as_accurate_as_eager(function, arguments, reference=multi_lora_linear):
    """Output and gradients: the error against fp64 is at most twice eager's in the same dtype.

    For fewer than `FEW` numbers, of which eager's error may be near zero by luck, half a rounding of the sums of absolute
    values more: without it 59 results of 1,132 small random cases (fp32 and fp16, interpreted) were beyond twice, of up to
    32 numbers that are not zero.
    """
    exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
    sizes = [a.abs() if a is not None and a.is_floating_point() else a for a in exact]
    upstream = upstream_of(arguments)
    found, eager, truth = (
        results(f, a, upstream) for f, a in ((function, arguments), (reference, arguments), (reference, exact))
    )
    largest = results(reference, sizes, upstream.abs())
    rounding = torch.finfo(arguments[0].dtype).eps
    for name in found:
        slack = 0.5 * rounding * largest[name].norm() if truth[name].count_nonzero() < FEW else 0
        assert found[name].dtype == eager[name].dtype
        error, allowed = ((result[name].double() - truth[name]).norm() for result in (found, eager))
        assert error <= 2 * allowed + slack, (name, error, allowed)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def launches(monkeypatch):
    """A list to which every launch adds its kernel's name and constants."""
    seen, wrap = [], launch.wrap_triton

    class Seen:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def call(*args, **kwargs):
                seen.append((self.kernel.__name__, kwargs))
                return wrap(self.kernel)[grid](*args, **kwargs)

            return call

    monkeypatch.setattr(replay, "enabled", False)
    monkeypatch.setattr(launch, "wrap_triton", Seen)
    return seen
