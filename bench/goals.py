"""The ratios to reach, and what the records of a GPU say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.cases import QWEN_IMAGE
from bench.providers import BASE, OURS, is_ours

Record = dict
MAX_SLOWER = 1.02
"""Ours over the fastest other provider, at most, in every case of a layer or of its low-rank part."""
GRADIENT_ERROR = 1e-5


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of every case that it applies to.

    Attributes:
        title: what is compared.
        shape: (K, N) of the linear cases it applies to; None for all of the kind.
        applies: which records it is about.
        figure: the figure of a record; None where what it needs was not measured.
        limit: the bound.
        at_most: whether the figure may not be above it, or not below.
    """

    title: str
    shape: tuple[int, int] | None
    applies: Callable[[Record], bool]
    figure: Callable[[Record], float | None]
    limit: float
    at_most: bool


@dataclass(frozen=True)
class Verdict:
    """A goal beside the case that is furthest from it; met where all measured cases meet it, None where none was."""

    goal: Goal
    cases: int
    worst: float | None
    worst_case: str

    @property
    def met(self) -> bool | None:
        if self.worst is None:
            return None
        return self.worst <= self.goal.limit if self.goal.at_most else self.worst >= self.goal.limit


def median(record: Record, provider: str) -> float | None:
    """A provider's median in ms; None where it was not timed."""
    return record["providers"].get(provider, {}).get("median_ms")


def ratio(over: str, under: str) -> Callable[[Record], float | None]:
    """Figure: the median of `over` by that of `under`."""

    def figure(record: Record) -> float | None:
        above, below = median(record, over), median(record, under)
        return None if above is None or below is None else above / below

    return figure


def fastest_other(record: Record) -> tuple[str, float] | None:
    """Name and median of the fastest provider that computes the case and is not ours."""
    times = {name: median(record, name) for name in record["providers"] if name != BASE and not is_ours(name)}
    timed = {name: ms for name, ms in times.items() if ms is not None}
    return min(timed.items(), key=lambda item: item[1]) if timed else None


def over_fastest_other(record: Record) -> float | None:
    """Figure: ours by the fastest other provider."""
    mine, other = median(record, OURS), fastest_other(record)
    return None if mine is None or other is None else mine / other[1]


def memory_over_peft(record: Record) -> float | None:
    """Figure: peak memory of ours by that of eager PEFT."""
    peaks = [record["providers"].get(name, {}).get("peak_mib") for name in (OURS, "peft", "peft_mixed")]
    others = [peak for peak in peaks[1:] if peak]
    return None if peaks[0] is None or not others else peaks[0] / min(others)


def gradient_error(record: Record) -> float | None:
    """Figure: relative L2 error of our gradient of the loss against fp64."""
    return record["providers"].get(OURS, {}).get("errors", {}).get("gradient")


def goals() -> list[Goal]:
    """All goals, in the order of the report."""
    return [*_linear_goals(), *_loss_goals(), *_stack_goals()]


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """What the finished records say of every goal."""
    return [_verdict(goal, records) for goal in goals()]


def _verdict(goal: Goal, records: Sequence[Record]) -> Verdict:
    figures = [(goal.figure(record), record["name"]) for record in records if goal.applies(record)]
    known = [(figure, name) for figure, name in figures if figure is not None]
    if not known:
        return Verdict(goal, 0, None, "")
    worst, name = (max if goal.at_most else min)(known)
    return Verdict(goal, len(known), worst, name)


def _linear_goals() -> Iterator[Goal]:
    rows = (
        ("forward, rank 64, over the base layer alone", "forward", _rank_64, BASE, (1.12, 1.07, 1.10)),
        (
            "forward, 4 and more adapters, PEFT mixed over ours",
            "forward",
            _four_adapters,
            "peft_mixed",
            (1.5, 1.5, 1.2),
        ),
        ("forward, one adapter, PEFT over ours", "forward", _one_adapter, "peft", (1.25, 1.25, 1.06)),
        ("forward, one adapter, compiled PEFT over ours", "forward", _one_adapter, "peft_compiled", (1.12, 1.12, 1.03)),
        ("student, forward and backward, PEFT over ours", "student", _one_adapter, "peft", (1.20, 1.15, 1.10)),
    )
    for title, mode, applies, other, limits in rows:
        figure = ratio(OURS, BASE) if other == BASE else ratio(other, OURS)
        for shape, limit in zip(QWEN_IMAGE, limits, strict=True):
            yield Goal(title, shape, _linear(mode, shape, applies), figure, limit, at_most=other == BASE)
    yield from _against_all("LinearCase", "")
    yield from _against_all("AddCase", "low-rank part alone, ")


def _against_all(family: str, title: str) -> Iterator[Goal]:
    of = lambda record: record["family"] == family  # noqa: E731
    yield Goal(f"{title}ours over the fastest other provider", None, of, over_fastest_other, MAX_SLOWER, at_most=True)
    yield Goal(f"{title}peak memory over PEFT's", None, of, memory_over_peft, 1.0, at_most=True)


def _loss_goals() -> list[Goal]:
    fp32 = lambda record: record["family"] == "LossCase" and record["case"]["dtype"] == "float32"  # noqa: E731
    return [
        Goal("loss, fp64 eager over ours", None, fp32, ratio("paper_fp64", OURS), 10.0, at_most=False),
        Goal("loss, torch.compile over ours", None, fp32, ratio("compiled", OURS), 1.0, at_most=False),
        Goal("loss, its gradient compiled too, over ours", None, fp32, ratio("compiled_returned", OURS), 1.0, False),
        Goal("loss, error of the gradient against fp64", None, fp32, gradient_error, GRADIENT_ERROR, at_most=True),
    ]


def _stack_goals() -> list[Goal]:
    stack = lambda record: record["family"] == "StackCase"  # noqa: E731
    return [
        Goal("stack, PEFT mixed over ours", None, stack, ratio("peft_mixed", OURS), 1.0, at_most=False),
        Goal("stack, PEFT switched per sample over ours", None, stack, ratio("peft_switch", OURS), 1.0, at_most=False),
        Goal("stack, peak memory over PEFT's", None, stack, memory_over_peft, 1.0, at_most=True),
    ]


def _linear(mode: str, shape: tuple[int, int], applies: Callable[[dict], bool]) -> Callable[[Record], bool]:
    def of(record: Record) -> bool:
        case = record["case"]
        if record["family"] != "LinearCase" or (case["in_features"], case["out_features"]) != shape:
            return False
        return case["mode"] == mode and applies(case)

    return of


def _rank_64(case: dict) -> bool:
    return case["rank"] == 64


def _one_adapter(case: dict) -> bool:
    return case["adapters"] == 1


def _four_adapters(case: dict) -> bool:
    return case["adapters"] >= 4
