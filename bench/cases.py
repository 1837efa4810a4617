"""The measured cases: linear layers, their low-rank part, losses and a transformer stack, the most telling first.

Legend: B samples, T tokens of a sample, M = B T rows, K inputs, N outputs, E adapters, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

QWEN_IMAGE = ((3072, 3072), (3072, 12288), (12288, 3072))
"""(K, N) of Qwen-Image's attention projections and of its MLP."""
FLUX2_KLEIN = ((3072, 27648), (3072, 18432), (9216, 3072))
"""(K, N) of FLUX.2 [klein] 4B: q, k, v, gate and up of a single block in one; the MLP of a double block. Its attention
projections and the single block's output have the shapes of Qwen-Image's; its layers have no bias."""
SHAPES = tuple([(k, n, True) for k, n in QWEN_IMAGE] + [(k, n, False) for k, n in FLUX2_KLEIN])
"""(K, N, whether the layer has a bias)."""
ROWS = (4096, 8192, 16384, 32768)
TELLING_ROWS = {1: 8192, 4: 16384}
"""By number of adapters, the rows of the cases that the goals name."""
ADAPTERS = (1, 2, 4, 8)
RANKS = (16, 64, 128)
MAX_TOKENS = 4096
"""Tokens of a picture of 1024 x 1024."""


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """One linear layer with adapters; sample b uses adapter b mod E.

    Attributes:
        mode: "forward", or "student": forward and backward to x, lora_A and lora_B of the one adapter.
    """

    mode: str
    in_features: int
    out_features: int
    samples: int
    tokens: int
    adapters: int
    rank: int
    dtype: str = "bfloat16"
    bias: bool = True

    @property
    def rows(self) -> int:
        return self.samples * self.tokens

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(K, N) of the products with adapters; the gradient of x is one more."""
        forward = (self.in_features, self.out_features)
        return (forward, forward[::-1]) if self.mode == "student" else (forward,)

    @property
    def name(self) -> str:
        shape = f"{self.in_features}x{self.out_features}-b{self.samples}-t{self.tokens}"
        return f"linear-{self.mode}-{shape}-e{self.adapters}-r{self.rank}-{self.dtype}"


@dataclass(frozen=True, kw_only=True)
class AddCase(LinearCase):
    """The low-rank part, added to the output of a quantised or offloaded layer; its mode "student" as that of the layer."""

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        return ()

    @property
    def name(self) -> str:
        return "add" + super().name.removeprefix("linear")


@dataclass(frozen=True, kw_only=True)
class DesignCase(LinearCase):
    """A linear layer for which every design is forced; its samples are sorted by adapter, as the trainer sorts them.

    Attributes:
        factors: dtype of lora_A and lora_B; the bank keeps those of a trained adapter in fp32.
    """

    factors: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"design{super().name.removeprefix('linear')}-{self.factors}-factors"


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """The coarse-to-fine loss and its gradient on B rows: a third each (rounded) of the kinds BS, TS and anchor."""

    samples: int
    latent: tuple[int, ...] = (16, 128, 128)
    dtype: str = "float32"

    @property
    def kinds(self) -> tuple[int, ...]:
        """Per row 0 (BS), 1 (TS) or 2 (anchor), in this order; the first of the batch's rows to exist is a BS row."""
        return tuple(sorted(row % 3 for row in range(self.samples)))

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        return ()

    @property
    def name(self) -> str:
        return f"loss-b{self.samples}-{'x'.join(map(str, self.latent))}-{self.dtype}"


@dataclass(frozen=True, kw_only=True)
class StackCase:
    """A scoring pass (no gradient) through transformer blocks; sample b uses adapter b mod E in every linear layer."""

    blocks: int = 4
    heads: int = 24
    head_size: int = 128
    samples: int = 8
    tokens: int = 4096
    adapters: int = 6
    rank: int = 64
    dtype: str = "bfloat16"

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(K, N) of the products with adapters."""
        return (self.hidden, self.hidden), (self.hidden, 4 * self.hidden), (4 * self.hidden, self.hidden)

    @property
    def name(self) -> str:
        shape = f"{self.blocks}x{self.hidden}-b{self.samples}-t{self.tokens}"
        return f"stack-{shape}-e{self.adapters}-r{self.rank}-{self.dtype}"


Case = LinearCase | AddCase | DesignCase | LossCase | StackCase


def adapter_of(case: LinearCase | StackCase) -> list[int]:
    """The adapter of each sample. Neighbours differ, the order that a shuffled batch comes in, but in a `DesignCase`."""
    if isinstance(case, DesignCase):
        return [sample * case.adapters // case.samples for sample in range(case.samples)]
    return [sample % case.adapters for sample in range(case.samples)]


def rows_per_adapter(case: LinearCase | StackCase) -> int:
    """The rows of the adapter that has the fewest."""
    return case.samples // case.adapters * case.tokens


def telling_cases() -> list[Case]:
    """Those that the goals are about."""
    return [*(case for case in _linear_cases() if _distance(case) == 0), *_losses("float32"), StackCase()]


def gpu_cases() -> list[Case]:
    """Every case of a full run in the order in which they are measured."""
    others = [*(case for case in _linear_cases() if _distance(case) > 0), *_add_cases()]
    return [*telling_cases(), *_losses("bfloat16"), *sorted(others, key=_distance)]


def design_cases() -> list[Case]:
    """Those from which the table of designs is made: every shape of Qwen-Image, few and many rows per adapter."""
    batches = ((2, 4096, 1), (4, 4096, 4), (8, 1024, 8), (8, 4096, 1))  # samples, tokens, adapters
    modes = [("forward", "bfloat16", rank, batch) for rank, batch in product((64, 128, 16), batches)]
    modes += [("forward", "float32", rank, batches[0]) for rank in (64, 128)]
    modes += [("student", "float32", rank, batches[0]) for rank in (64, 128)]
    return [
        DesignCase(
            mode=mode, in_features=k, out_features=n, samples=samples, tokens=tokens, adapters=adapters, rank=rank,
            factors=factors,
        )
        for (mode, factors, rank, (samples, tokens, adapters)), (k, n) in product(modes, QWEN_IMAGE)
    ]  # fmt: skip


def cpu_cases() -> list[Case]:
    """Small cases of every kind that a CPU does in milliseconds."""
    forward = LinearCase(
        mode="forward", in_features=192, out_features=256, samples=4, tokens=64, adapters=3, rank=8, dtype="float32"
    )
    return [
        forward,
        replace(forward, adapters=1),
        replace(forward, mode="student", adapters=1),
        AddCase(**vars(forward)),
        DesignCase(**vars(forward), factors="float32"),
        LossCase(samples=4, latent=(16, 16, 16)),
        StackCase(blocks=2, heads=4, head_size=16, samples=4, tokens=16, adapters=3, rank=4, dtype="float32"),
    ]


CASES = {"telling": telling_cases, "every": gpu_cases, "designs": design_cases}
"""By the names that the command takes."""


def _losses(dtype: str) -> list[LossCase]:
    return [LossCase(samples=samples, dtype=dtype) for samples in (1, 4, 16)]


def _linear_cases() -> list[LinearCase]:
    modes = [("forward", adapters) for adapters in ADAPTERS] + [("student", 1)]
    return [
        _linear_case(mode, shape, rows, adapters, rank)
        for (mode, adapters), shape, rows, rank in product(modes, SHAPES, ROWS, RANKS)
    ]


def _add_cases() -> list[AddCase]:
    """Every shape and rank at the rows that the goals of the linear layer name."""
    modes = (("forward", 1), ("forward", 4), ("student", 1))
    linear = [
        _linear_case(mode, shape, TELLING_ROWS[adapters], adapters, rank)
        for (mode, adapters), shape, rank in product(modes, SHAPES, RANKS)
    ]
    return [AddCase(**vars(case)) for case in linear]


def _linear_case(mode: str, shape: tuple[int, int, bool], rows: int, adapters: int, rank: int) -> LinearCase:
    """Samples of `MAX_TOKENS` tokens, or shorter ones where each adapter would not get one."""
    k, n, bias = shape
    tokens = min(MAX_TOKENS, rows // adapters)
    return LinearCase(
        mode=mode,
        in_features=k,
        out_features=n,
        samples=rows // tokens,
        tokens=tokens,
        adapters=adapters,
        rank=rank,
        bias=bias,
    )


def _distance(case: LinearCase) -> int:
    """In how many respects a case differs from those that the goals name; measured in this order."""
    return sum(
        [
            (case.in_features, case.out_features) not in QWEN_IMAGE,
            case.rank != 64,
            case.adapters not in TELLING_ROWS,
            case.rows != TELLING_ROWS.get(case.adapters, 16384),
        ]
    )
