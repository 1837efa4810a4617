"""Measures one case: gate, memory, then the times of all providers that passed, in turns."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch

from bench import add, designs, gate, linear, loss, stack
from bench.cases import AddCase, Case, DesignCase, LinearCase, LossCase, StackCase
from bench.providers import BASE, Builder, Call, Outputs, Unavailable
from bench.timing import Stopwatch, interleave
from bench.work import floor_ms, work_of

FAMILIES = {LinearCase: linear, AddCase: add, DesignCase: designs, LossCase: loss, StackCase: stack}
MIB = 1 << 20


class DeviceLost(RuntimeError):
    """The GPU answers every call with an error since a provider ran; only a new process can use it again."""


@dataclass(frozen=True)
class Bench:
    """The device and the way that cases are timed.

    Attributes:
        roof: as `machine.measure_roof` returns it; None where it was not measured.
        rounds: timed calls per provider, after `warmup` untimed ones.
    """

    device: torch.device
    stopwatch: Stopwatch
    roof: dict[str, float] | None
    rounds: int = 30
    warmup: int = 3


def family_of(case: Case) -> ModuleType:
    """The module that computes a case.

    Its ``make_inputs(case, device)`` makes the inputs of the others: ``expected(inputs)``, the outputs in fp64,
    ``eager(inputs)``, those of eager PyTorch in the case's dtype, and each builder of ``providers(case)``.
    """
    return FAMILIES[type(case)]


def measure(case: Case, bench: Bench, record: dict, save: Callable[[], None]) -> None:
    """Fills a record that has begun: an entry for each provider that is not in it, then its status.

    Args:
        save: writes the record; called whenever "current" has changed.

    Raises:
        DeviceLost: a provider broke the GPU; the record stays "running", with the error in the provider's entry.
    """
    record["work"] = asdict(work_of(case))
    try:
        calls = _admitted(case, bench, record, save)
        record["current"] = "timing"
        save()
        times = interleave(calls, bench.stopwatch, bench.rounds, bench.warmup)
    except DeviceLost:
        raise
    except Exception as error:  # such as too little memory for the inputs
        record |= {"status": "failed", "error": describe_error(error)}
        save()
        check_alive(bench.device, case.name)
        return
    # The share of the roof: the least time for the case's arithmetic and traffic, over the median.
    for name, figures in times.items():
        record["providers"][name] |= figures
        if bench.roof is not None:
            floor = floor_ms(work_of(case, adapted=name != BASE), bench.roof)
            record["providers"][name]["roof_percent"] = 100 * floor / figures["median_ms"]
    record["status"] = "done"


def prepare(case: Case, device: torch.device) -> tuple[Any, Outputs, dict[str, float]]:
    """Inputs of a case, its outputs in fp64 and the error that the gate allows each."""
    family = family_of(case)
    inputs = family.make_inputs(case, device)
    expected = family.expected(inputs)
    return inputs, expected, gate.bounds(gate.errors(family.eager(inputs), expected), expected)


def release() -> None:
    """Empties the caches of compilers and allocators after a case."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def describe_error(error: BaseException) -> str:
    """Kind and first lines of an error, short enough for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def check_alive(device: torch.device, after: str) -> None:
    """Raises DeviceLost where the GPU no longer works after something failed."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise DeviceLost(f"after {after}: {describe_error(error)}") from error


def _admitted(case: Case, bench: Bench, record: dict, save: Callable[[], None]) -> dict[str, Call]:
    """The calls of the providers that run and pass the gate."""
    record["current"] = "inputs"
    save()
    inputs, expected, record["allowed_errors"] = prepare(case, bench.device)
    calls = {}
    for name, build in family_of(case).providers(case).items():
        if name in record["providers"]:
            continue
        if "compiled" in name and bench.device.type == "cpu":
            record["providers"][name] = {"unavailable": "torch.compile takes longer than the case on a CPU"}
            continue
        record["current"] = name
        save()
        entry, call = _admit(name, build, inputs, expected, record["allowed_errors"])
        record["providers"][name] = entry
        if call is not None:
            calls[name] = call
        elif "failed" in entry:
            save()
            check_alive(bench.device, name)
    return calls


def _admit(
    name: str, build: Builder, inputs: Any, expected: Outputs, allowed: dict[str, float]
) -> tuple[dict, Call | None]:
    """Checks a provider against fp64; returns its entry, and its call if it may be timed."""
    try:
        call = build(inputs)
        found = gate.errors(call(), {} if name == BASE else expected)
        if wrong := gate.violation(found, {} if name == BASE else allowed):
            return {"wrong": wrong, "errors": found}, None
        return {"errors": found, "peak_mib": _peak_mib(call)}, call
    except Unavailable as reason:
        return {"unavailable": str(reason)}, None
    except Exception as error:  # every failure of a provider is a result
        return {"failed": describe_error(error)}, None


def _peak_mib(call: Call) -> float | None:
    """Peak memory of one call, its results included, beyond the memory held before; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # Inputs, weights and adapters, which are not the call's own.
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB
