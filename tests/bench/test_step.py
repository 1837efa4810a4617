"""The benchmark of a whole update: all ways compute the same losses; what is run, resumed and shown."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bench.step import run, worker
from bench.step.peers import PeerTrainer, ThreeCopies
from bench.step.run import BASELINE, TOLERANCE, largest_difference, main
from bench.step.world import StepCase, World
from bench.timing import UNFINISHED
from clora.ops import VARIABLE

TINY = StepCase(
    name="tiny",
    layers=1,
    heads=2,
    head_size=16,
    axes=(4, 6, 6),
    text_width=16,
    grid=2,
    samples=4,
    text_tokens=3,
    teachers=3,
    student_rank=4,
    teacher_rank=2,
)
OURS_AND_OTHERS = (BASELINE, "peft_mixed", "ours_eager", "ours_one_row")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """What a worker sets for its process is undone after a test."""
    monkeypatch.setenv(VARIABLE, "")


@pytest.fixture(scope="module")
def losses():
    """Returns the losses of two updates in a way."""
    return {way: worker.measure(TINY, way, CPU, 2) for way in OURS_AND_OTHERS}


@pytest.mark.parametrize("way", OURS_AND_OTHERS[1:])
def test_all_ways_have_the_same_losses(losses, way):
    assert largest_difference(losses[way]["losses"], losses[BASELINE]["losses"]) <= TOLERANCE
    # Rows of all kinds are compared.
    assert all(any(update[name] > 0 for update in losses[way]["losses"]) for name in worker.LOSSES)


@pytest.mark.parametrize("name", ["student", "critic"])
def test_a_gradient_that_is_lost_shows_in_the_second_update(losses, name, monkeypatch):
    step = PeerTrainer.step
    monkeypatch.setattr(PeerTrainer, "step", lambda self, other: None if other == name else step(self, other))
    broken = worker.measure(TINY, BASELINE, CPU, 2)["losses"]
    assert largest_difference(broken, losses[BASELINE]["losses"]) > TOLERANCE


def test_a_teacher_of_another_sample_shows(losses, monkeypatch):
    monkeypatch.setattr(ThreeCopies, "switch", lambda self, name: None)  # the first stays for all
    broken = worker.measure(TINY, BASELINE, CPU, 1)["losses"]
    assert largest_difference(broken, losses[BASELINE]["losses"][:1]) > TOLERANCE


def test_a_measurement_has_times_and_memory(losses):
    found = losses["ours_eager"]
    assert len(found["seconds"]) == 1  # the first update is not timed
    assert found["seconds"][0] > 0
    assert found["before_mib"] > 100
    assert found["peak_mib"] >= 0


def test_every_process_makes_the_same_weights():
    first, second = (World(TINY, CPU, 1).adapter().pipeline.transformer.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Worker:
    """Stands in for the processes: losses as given by way, an update of one second, of our way half."""

    def __init__(self, losses=None, failing=()):
        self.losses, self.failing, self.commands = losses or {}, failing, []

    def __call__(self, command, limit):
        self.commands.append(list(command))
        way = command[1]
        if way in self.failing:
            return {"failed": "out of memory"}
        seconds = 0.5 if way == "ours_eager" else 1.0
        row = dict.fromkeys(worker.LOSSES, self.losses.get(way, 1.0))
        figures = {"clock": "wall", "threads": 1, "before_mib": 100.0, "peak_mib": 200 * seconds}
        return {"losses": [row, row], "seconds": [seconds, seconds], **figures}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Returns command(worker, *options), which returns its exit code and the record of the one case."""
    monkeypatch.setattr(run, "CPU_CASES", (TINY,))
    monkeypatch.setattr(run, "GOAL_CASE", TINY.name)
    monkeypatch.setattr(run.machine, "tree", lambda: "t1")

    def go(processes, *options):
        arguments = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "3", *options]
        code = main(arguments, processes)
        return code, json.loads(Path(tmp_path / "cpu" / "tiny.json").read_text())

    return go


def test_the_ways_take_turns_after_all_were_checked(command, capsys):
    processes = Worker()
    code, record = command(processes)
    assert code == 0
    ways = [command[1] for command in processes.commands]
    assert ways[:4] == list(OURS_AND_OTHERS)
    assert ["--dtype" in command for command in processes.commands] == [True] * 4 + [False] * 12
    assert ways[4:8] == list(OURS_AND_OTHERS)
    assert ways[8] == "peft_mixed"
    assert record["summary"]["ours_eager"]["speed"] == 2
    assert record["summary"]["ours_eager"]["memory"] == 0.5
    printed = capsys.readouterr().out
    assert "| ours_eager | 2 | 8 | 2.00 | 0.5 to 0.5 | 100 | 0.50 |" in printed
    assert "| ours_triton | needs a GPU |" in printed
    assert "ours_eager, memory: 0.50, goal <= 0.45, not met" in printed
    assert "ours_eager, speed: 2.00, goal >= 1.25, met" in printed


def test_a_way_with_other_losses_is_not_timed(command, capsys):
    processes = Worker(losses={"ours_eager": 1.0001})
    code, record = command(processes)
    assert code == 1
    assert "differ" in record["ways"]["ours_eager"]["failed"]
    assert not record["ways"]["ours_eager"]["rounds"]
    assert len(record["ways"]["peft_mixed"]["rounds"]) == 3
    assert "its losses differ from those of three_copies by 1.0e-04" in capsys.readouterr().out


def test_a_process_that_fails_is_named(command, capsys):
    code, _ = command(Worker(failing=("peft_mixed",)))
    assert code == 1
    assert "| peft_mixed | out of memory |" in capsys.readouterr().out


def test_a_run_goes_on_where_it_stopped(command, monkeypatch):
    command(Worker(), "--rounds", "1")
    again = Worker()
    _, record = command(again)
    assert len(again.commands) == 8  # two rounds of four ways, and no check
    assert record["summary"][BASELINE]["rounds"] == 3
    monkeypatch.setattr(run.machine, "tree", lambda: "t2")  # at a commit that may be unknown
    anew = Worker()
    command(anew)
    assert len(anew.commands) == 16


def test_without_time_nothing_begins(command, tmp_path):
    processes = Worker()
    with pytest.raises(FileNotFoundError):
        command(processes, "--budget-s", "1e-9")
    assert processes.commands == []


def test_a_process_ends_with_the_time(command, tmp_path, capsys):
    def slow(job, limit):
        time.sleep(limit)
        raise subprocess.TimeoutExpired(job, limit)

    assert main(["--device", "cpu", "--out", str(tmp_path), "--budget-s", "0.1"], slow) == UNFINISHED
    assert not (tmp_path / "cpu").exists()
    assert "| three_copies | not measured yet |" in capsys.readouterr().out
    with pytest.raises(subprocess.TimeoutExpired):
        run.run_worker(["step-3m", BASELINE], limit=0.1)


def test_an_error_of_a_process_is_its_last_line():
    found = run.run_worker(["no-such-case", BASELINE])
    assert "no-such-case" in found["failed"]
