"""Time of an update with 2, 12 and 50 teachers in the bank, of which each batch needs the same two. Needs no GPU.

`python -m bench.teachers` makes updates of the critic and the student of `bench.step`'s small model. The three trainers make the
same draws, so that their losses are equal to the bit, and take turns in one process. What may grow with the number of teachers is
their memory, never the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace

import torch

from bench import machine, records
from bench.arguments import RESULTS, Parser, run, whole
from bench.step.world import CPU_CASES, StepCase, World
from bench.timing import spread
from clora.bank.bank import AdapterBank
from clora.training.faults import raise_first
from clora.training.steps import CRITIC
from clora.training.student import initial_student
from clora.training.trainer import DistillTrainer

COUNTS = (2, 12, 50)
NEEDED = 2
"""Teachers of the batches."""
GOAL = 0.03
"""Largest difference of the time from that with `NEEDED` teachers."""
WARMUP = 2
CASE = next(case for case in CPU_CASES if case.name == "step-3m")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table and writes ``teachers.json``.

    Returns:
        0; 1 if a time differs by more than `GOAL`.
    """
    parser = Parser("bench.teachers", __doc__.splitlines()[0])
    parser.add_out(RESULTS / "cpu")
    parser.add_argument("--rounds", type=whole(), default=40, help="updates of each number of teachers (default: 40)")
    arguments = parser.parse_args(argv)
    out = parser.out(arguments, "rounds")
    record = measure(CASE, arguments.rounds)
    for count, figures in record["teachers"].items():
        ratio = f"{figures['ratio'] - 1:+.1%}"
        print(f"{count:>3} teachers  {figures['bank_mb']:7.1f} MB  {figures['median_ms']:7.1f} ms an update  {ratio}")
    records.write(out / "teachers.json", record)
    return int(any(abs(figures["ratio"] - 1) > GOAL for figures in record["teachers"].values()))


def measure(case: StepCase, rounds: int, counts: Sequence[int] = COUNTS) -> dict:
    """Times updates, each round one of every number of teachers.

    Returns:
        the conditions; per number of teachers the bank's megabytes, the milliseconds of an update and ``ratio``, the
        median over rounds of its time against that with the fewest teachers.

    Raises:
        RuntimeError: the losses are not equal.
    """
    one_thread = torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    with ExitStack() as stack:
        trainers = {count: stack.enter_context(trainer_with(case, count)) for count in counts}
        megabytes = {count: trainer.bank.bytes().device / 1e6 for count, trainer in trainers.items()}
        for turn in range(WARMUP + rounds):
            losses = {}
            # Rotated, so that none always follows the same one.
            for count in (*counts[turn % len(counts) :], *counts[: turn % len(counts)]):
                begun = clock()
                losses[count] = update(trainers[count])
                if turn >= WARMUP:
                    seconds[count].append(clock() - begun)
            if any(losses[count] != losses[counts[0]] for count in counts):
                raise RuntimeError(f"expected equal losses for every number of teachers, found {losses}")
    teachers = {}
    for count in counts:
        ratios = [own / fewest for own, fewest in zip(seconds[count], seconds[counts[0]], strict=True)]
        times = spread([1e3 * value for value in seconds[count]])
        teachers[count] = {"bank_mb": megabytes[count], **times, "ratio": statistics.median(ratios)}
    return {
        "case": asdict(replace(case, teachers=NEEDED)),
        "commit": machine.commit(),
        "host": machine.describe_host(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if one_thread else "wall",
        "rounds": rounds,
        "teachers": teachers,
    }


@contextmanager
def trainer_with(case: StepCase, count: int) -> Iterator[DistillTrainer]:
    """Yields a trainer whose bank holds ``count`` teachers and whose data are of the first `NEEDED`."""
    world = World(replace(case, teachers=NEEDED), torch.device("cpu"), updates=1000)
    adapter = world.adapter()
    transformer = adapter.pipeline.transformer
    teachers = World(replace(case, teachers=count), torch.device("cpu"), updates=1).teachers(transformer)
    student = initial_student(world.config, transformer, list(teachers.values()))
    data = world.data(adapter)
    with AdapterBank(transformer, {CRITIC: student, **teachers}, fixed=1) as bank:
        yield DistillTrainer(world.config, adapter, bank, data, student, student)


def update(trainer: DistillTrainer) -> dict[str, float]:
    """One update of the critic and of the student; returns their losses."""
    batch = trainer.sampler.gather(torch.zeros(trainer.config.train.batch_size, dtype=torch.bool))  # no general rows
    rollout = trainer.steps.simulate(batch)
    return raise_first([trainer.steps.critic_step(batch, rollout), trainer.steps.student_step(batch, rollout)])


if __name__ == "__main__":
    run(main)
