"""The ratios to reach, and whether the records of a GPU reach them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from bench.cases import QWEN_IMAGE
from bench.providers import BASE, OURS, is_ours

Record = dict
Figure = Callable[[Record], float | None]
"""A number of a record; None where a time or an error that it needs was not measured."""
MAX_SLOWER = 1.02
"""Largest ratio of ours to the fastest other provider, in every case of a layer or of its low-rank part."""
GRADIENT_ERROR = 1e-5


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of every case that it applies to.

    Attributes:
        title: the comparison.
        family: class name of the cases that it applies to.
        figure: the figure of a record.
        limit: the bound.
        at_most: the figure may not be above the bound; otherwise it may not be below it.
        where: values of a case's fields to which it is limited.
        shape: (K, N) of the linear layer; None for every shape.
    """

    title: str
    family: str
    figure: Figure
    limit: float
    at_most: bool = False
    where: Mapping[str, Collection] = field(default_factory=dict)
    shape: tuple[int, int] | None = None

    def concerns(self, record: Record) -> bool:
        """Tests whether the goal applies to the case of a record."""
        case = record["case"]
        if record["family"] != self.family or any(case[name] not in values for name, values in self.where.items()):
            return False
        return self.shape is None or self.shape == (case["in_features"], case["out_features"])


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


def ratio(over: str, under: str) -> Figure:
    """Figure: the median of `over` by that of `under`."""

    def figure(record: Record) -> float | None:
        above = median(record, over)
        below = median(record, under)
        return None if above is None or below is None else above / below

    return figure


def fastest_other(record: Record) -> tuple[str, float] | None:
    """Name and median of the fastest provider that computes the case and is not ours."""
    others = [name for name in record["providers"] if name != BASE and not is_ours(name)]
    times = {name: ms for name in others if (ms := median(record, name)) is not None}
    return min(times.items(), key=lambda item: item[1], default=None)


def over_fastest_other(record: Record) -> float | None:
    """Figure: ours by the fastest other provider."""
    mine = median(record, OURS)
    other = fastest_other(record)
    return None if mine is None or other is None else mine / other[1]


def memory_over_peft(record: Record) -> float | None:
    """Figure: peak memory of ours by that of eager PEFT."""
    mine, *others = (record["providers"].get(name, {}).get("peak_mib") for name in (OURS, "peft", "peft_mixed"))
    # A case has PEFT's plain layer or its mixed batch.
    others = [peak for peak in others if peak]
    return None if mine is None or not others else mine / min(others)


def gradient_error(record: Record) -> float | None:
    """Figure: relative L2 error of our gradient of the loss against fp64."""
    return record["providers"].get(OURS, {}).get("errors", {}).get("gradient")


def goals() -> list[Goal]:
    """All goals, in the order of the report."""
    peft = ratio("peft", OURS)
    compiled = ratio("peft_compiled", OURS)
    mixed = ratio("peft_mixed", OURS)
    over_base = ratio(OURS, BASE)
    return [
        *_linear("forward", "rank 64, over the base layer", over_base, (1.12, 1.07, 1.10), True, rank=[64]),
        *_linear("forward", "4 and more adapters, PEFT mixed over ours", mixed, (1.5, 1.5, 1.2), adapters=[4, 8]),
        *_linear("forward", "one adapter, PEFT over ours", peft, (1.25, 1.25, 1.06), adapters=[1]),
        *_linear("forward", "one adapter, compiled PEFT over ours", compiled, (1.12, 1.12, 1.03), adapters=[1]),
        *_linear("student", "forward and backward, PEFT over ours", peft, (1.20, 1.15, 1.10), adapters=[1]),
        *_against_all("LinearCase", ""),
        *_against_all("AddCase", "low-rank part, "),
        _loss("loss, fp64 eager over ours", ratio("paper_fp64", OURS), 10.0),
        _loss("loss, torch.compile over ours", ratio("compiled", OURS), 1.0),
        _loss("loss, its gradient compiled too, over ours", ratio("compiled_returned", OURS), 1.0),
        _loss("loss, error of the gradient against fp64", gradient_error, GRADIENT_ERROR, at_most=True),
        Goal("stack, PEFT mixed over ours", "StackCase", mixed, 1.0),
        Goal("stack, PEFT switched per sample over ours", "StackCase", ratio("peft_switch", OURS), 1.0),
        Goal("stack, peak memory over PEFT's", "StackCase", memory_over_peft, 1.0, at_most=True),
    ]


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """The verdict of the finished records on every goal."""
    found = []
    for goal in goals():
        figures = [(goal.figure(record), record["name"]) for record in records if goal.concerns(record)]
        known = [(figure, name) for figure, name in figures if figure is not None]
        # The worst figure is the one furthest to the wrong side of the bound.
        worst, name = (max if goal.at_most else min)(known, default=(None, ""))
        found.append(Verdict(goal, len(known), worst, name))
    return found


def _linear(
    mode: str, title: str, figure: Figure, limits: Sequence[float], at_most: bool = False, **where
) -> list[Goal]:
    """A goal for each shape of Qwen-Image's linear layers, with its own limit."""
    where["mode"] = [mode]
    bounds = zip(QWEN_IMAGE, limits, strict=True)
    return [Goal(f"{mode}, {title}", "LinearCase", figure, limit, at_most, where, shape) for shape, limit in bounds]


def _against_all(family: str, title: str) -> list[Goal]:
    return [
        Goal(f"{title}ours over the fastest other provider", family, over_fastest_other, MAX_SLOWER, at_most=True),
        Goal(f"{title}peak memory over PEFT's", family, memory_over_peft, 1.0, at_most=True),
    ]


def _loss(title: str, figure: Figure, limit: float, at_most: bool = False) -> Goal:
    return Goal(title, "LossCase", figure, limit, at_most, {"dtype": ["float32"]})
