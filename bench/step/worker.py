"""Makes updates in one way, in a process of its own, and prints their losses, times and peak memory as JSON."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from bench.arguments import Parser, device_here, run, whole
from bench.step.peers import PeftMixed, ThreeCopies
from bench.step.world import CPU_CASES, GPU_CASES, StepCase, World
from clora.ops import VARIABLE
from clora.training.student import train_student
from clora.training.trainer import Report

LOSSES = ("critic", "dmd_bs", "dmd_ts", "anchor")
KIB = 1024
MIB = 1 << 20


def ours(world: World, report: Report) -> None:
    """The trainer of clora."""
    adapter = world.adapter()
    teachers = world.teachers(adapter.pipeline.transformer)
    train_student(world.config, adapter, teachers, world.data(adapter), report)


def ours_one_row(world: World, report: Report) -> None:
    """The same with one row in each pass that learns, as `three_copies` has: less memory, smaller products."""
    train = world.config.train.model_copy(update={"gradient_rows": 1})
    world.config = world.config.model_copy(update={"train": train})
    ours(world, report)


WAYS: Mapping[str, Callable[[World, Report], None]] = {
    "three_copies": lambda world, report: ThreeCopies(world).fit(report),
    "peft_mixed": lambda world, report: PeftMixed(world).fit(report),
    "ours_eager": ours,
    "ours_triton": ours,
    "ours_one_row": ours_one_row,
}
BACKENDS = {"ours_eager": "eager", "ours_triton": "triton"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = Parser("bench.step.worker", __doc__.splitlines()[0])
    parser.add_argument("case", choices=[case.name for case in CPU_CASES])
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="in place of the case's")
    parser.add_argument("--updates", type=whole(), default=2)
    arguments = parser.parse_args(argv)
    device = arguments.device
    cases = {case.name: case for case in (CPU_CASES if device.type == "cpu" else GPU_CASES)}
    case = cases[arguments.case]
    if arguments.dtype:
        case = replace(case, dtype=arguments.dtype)
    print(json.dumps(measure(case, arguments.way, device, arguments.updates)))
    return 0


def measure(case: StepCase, way: str, device: torch.device, updates: int) -> dict:
    """Makes updates in one way.

    Returns:
        ``losses``, a mapping for each update; ``seconds`` of each; ``peak_mib`` above what the process had before any
        model was made, and ``before_mib``.
    """
    os.environ[VARIABLE] = BACKENDS.get(way, "auto")
    load_libraries()
    clock = Clock(device)
    losses, stamps = [], []

    def report(update: int, values: Mapping[str, float]) -> None:
        stamps.append(clock.now())
        losses.append({name: values.get(name, 0.0) for name in LOSSES})

    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # every way's: clora chooses no others
    gc.collect()
    before = peak_bytes(device)
    WAYS[way](World(case, device, updates), report)
    # The first update's time has the making of the models in it.
    seconds = [later - earlier for earlier, later in zip(stamps[:-1], stamps[1:], strict=True)]
    return {
        "losses": losses,
        "seconds": seconds,
        "clock": clock.name,
        "threads": torch.get_num_threads(),
        "peak_mib": (peak_bytes(device) - before) / MIB,
        "before_mib": before / MIB,
    }


def load_libraries() -> None:
    """Imports what every way uses, so that none of it counts as a way's memory."""
    import peft  # noqa: F401
    from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel  # noqa: F401


class Clock:
    """The time of an update.

    On a CPU with one thread this is the processor's time, which other processes lengthen little; else the time that has
    passed, on a GPU until its work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        one_thread = device.type == "cpu" and torch.get_num_threads() == 1
        self.name = "processor" if one_thread else "wall"
        self._read = time.process_time if one_thread else time.perf_counter

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._read()


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had: of the GPU what torch allocated, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


if __name__ == "__main__":
    run(main)
