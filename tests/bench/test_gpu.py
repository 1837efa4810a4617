"""The one command on a CPU: every slice with its tasks replaced, its archive, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tarfile
from functools import partial

import pytest
import torch

import bench.gpu
import bench.profiled
import bench.worker
from bench.cases import DesignCase, LinearCase, LossCase
from bench.gpu import ARCHIVE, BUDGET_S, SLICES, slices
from bench.machine import ROOT
from bench.tasks import GRACE_S, NOTES
from bench.worker import measure_all as bench_measure_all
from clora.errors import CloraError
from csrc_triton.multi_lora.designs import DESIGNS

MACHINE = {"gpu": "Some GPU 1", "commit": "abc", "revision": "r1", "driver": "1.2"}
TREE = "t1"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A machine that has what the command asks for; returns the commands that it ran, all of which passed."""
    ran = []

    def execute(command, log, limit, pack):
        ran.append([part for part in command if part not in (sys.executable, "-m")])
        log.write_text("== 5 passed in 1s ==\n")
        return 0

    monkeypatch.setattr(bench.gpu.wheels, "missing", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.gpu, "describe", lambda device: MACHINE)
    monkeypatch.setattr(bench.gpu, "tree", lambda: TREE)
    monkeypatch.setattr(bench.gpu, "execute", execute)
    return ran


def files_in(archive):
    with tarfile.open(archive) as packed:
        return {member.name: packed.extractfile(member).read() for member in packed if member.isfile()}


@pytest.mark.parametrize("number", SLICES)
def test_a_slice_leaves_one_archive_and_prints_a_table_last(number, on_a_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.gpu.shutil, "which", lambda program: f"/usr/bin/{program}")
    assert bench.gpu.main(["--slice", str(number), "--out", str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [ARCHIVE]
    files = files_in(tmp_path / ARCHIVE)
    notes = json.loads(files["some-gpu-1/" + NOTES])
    assert "some-gpu-1/RESULTS.md" in files
    table = capsys.readouterr().out.partition(f"results: {tmp_path / ARCHIVE}\n")[2].strip().splitlines()
    assert len(table) == 2 + len(notes)
    for line, (name, entry) in zip(table[2:], notes.items(), strict=True):
        assert entry["machine"] == {**MACHINE, "tree": TREE}
        assert line.startswith(f"| {name} | {entry['outcome']} |")
    assert len(on_a_gpu) == sum(entry["outcome"] == "passed" for entry in notes.values()) > 0


def test_the_next_slice_goes_on_from_the_archive_of_the_last(on_a_gpu, tmp_path):
    for numbers, ran in ((["1"], 2), (["1"], 2), (["2"], 3), (["1", "2"], 3)):
        assert bench.gpu.main(["--slice", *numbers, "--out", str(tmp_path)]) == 0
        assert len(on_a_gpu) == ran
    assert {"tests", "designs", "cases"} == set(json.loads(files_in(tmp_path / ARCHIVE)["some-gpu-1/" + NOTES]))


@pytest.fixture
def on_this_cpu(monkeypatch):
    """The same, but the commands run in this process on small cases, by a clock that always reads a millisecond."""
    small = LinearCase(
        mode="forward", in_features=4, out_features=6, samples=2, tokens=3, adapters=2, rank=2, dtype="float32"
    )
    forced = DesignCase(**vars(small), factors="float32")
    machine = {
        **MACHINE,
        "capability": [9, 0],
        "triton": "3.7.1",
        "python": "3",
        "torch": "2",
        "cuda": "13",
        "peft": "0",
    }

    def execute(command, log, limit, pack):
        program, *arguments = command[command.index("-m") + 1 :]
        with log.open("w") as output, contextlib.redirect_stdout(output):
            if program == "bench.worker":
                return bench.worker.main(arguments)
            if program == "bench.profiled":
                return bench.profiled.main(arguments, forced, "cpu")
            return 0  # test_commands_take_their_options

    def stopwatch(call):
        call()
        return 1.0, 0.1

    monkeypatch.setenv("CLORA_BACKEND", "auto")  # restored afterwards: the worker sets it
    monkeypatch.setattr(bench.gpu.wheels, "missing", list)
    monkeypatch.setattr(bench.gpu.shutil, "which", lambda program: program)
    monkeypatch.setattr(bench.gpu, "DESIGNS", ("merged", "split"))  # fused needs a GPU
    monkeypatch.setattr(bench.gpu, "describe", lambda device: machine)
    monkeypatch.setattr(bench.gpu, "execute", execute)
    monkeypatch.setattr(bench.worker, "GPU", torch.device("cpu"))
    monkeypatch.setattr(bench.worker, "describe", lambda device: machine)
    monkeypatch.setattr(bench.worker, "measure_roof", lambda *given: {"tflop_per_s": 1.0, "gb_per_s": 1.0})
    monkeypatch.setattr(bench.worker, "CudaStopwatch", lambda device: stopwatch)
    monkeypatch.setattr(bench.worker, "release", lambda: None)
    monkeypatch.setattr(bench.worker, "Bench", partial(bench.worker.Bench, rounds=2, warmup=1))
    monkeypatch.setitem(bench.worker.CASES, "designs", lambda: [forced])
    monkeypatch.setitem(bench.worker.CASES, "telling", lambda: [small, LossCase(samples=2, latent=(2, 3))])
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda: None)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


@pytest.mark.usefixtures("on_this_cpu")
def test_a_dry_run_of_all_slices(tmp_path, monkeypatch, capsys):
    is_available = torch.cuda.is_available
    for number in map(str, SLICES):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("bench.worker.measure_all", measuring_without_a_gpu(is_available, monkeypatch))
        assert bench.gpu.main(["--slice", number, "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    files = files_in(tmp_path / ARCHIVE)
    notes = json.loads(files["some-gpu-1/" + NOTES])
    assert {entry["outcome"] for entry in notes.values()} == {"passed"}
    names = ["tests", "designs", "cases", "ncu-merged", "ncu-split", "step", "serving", "slow-tests", "demo"]
    assert list(notes) == names
    assert sum("/linear-" in name or "/loss-" in name for name in files) == 2
    results = files["some-gpu-1/RESULTS.md"].decode()
    assert "| case, over the base layer | fused | merged | split |" in results
    assert "## Loss" in results


def measuring_without_a_gpu(is_available, monkeypatch):
    def measure_all(*arguments):
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        return bench_measure_all(*arguments)

    return measure_all


def test_a_slice_for_which_the_time_is_too_short_writes_nothing(on_a_gpu, tmp_path):
    for options in (["--slice", "1", "--budget-s", "59"], ["--slice", "5", "--budget-s", "449"]):
        with pytest.raises(SystemExit, match="2"):
            bench.gpu.main([*options, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    assert not on_a_gpu


def test_a_failed_task_is_an_exit_code(on_a_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.gpu, "execute", lambda command, log, limit, pack: log.write_text("no") and 1)
    assert bench.gpu.main(["--slice", "2", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("every_case", [False, True])
def test_a_slice_takes_less_than_ten_minutes(every_case, tmp_path):
    """The limits of the tasks before the last of a slice leave that one time, and the slice begins soon enough to end."""
    assert BUDGET_S <= 570
    for tasks in slices(tmp_path, every_case).values():
        assert BUDGET_S - sum(task.most_s for task in tasks[:-1]) >= 60


def test_the_demo_has_the_time_that_it_takes(tmp_path):
    """A slice holds it, and what it needs to end in time."""
    (task,) = [task for tasks in slices(tmp_path, False).values() for task in tasks if task.name == "demo"]
    assert task.least_s <= BUDGET_S - 60
    assert min(task.most_s, BUDGET_S) - GRACE_S >= task.least_s


def test_what_the_slices_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.gpu.shutil, "which", lambda program: None)
    found = slices(tmp_path, False)
    assert found[1][0].command[:4] == ("pytest", "-q", "-n", "auto")
    assert found[1][1].command[-2:] == ("--cases", "designs")
    assert (found[2][0].command[-1], slices(tmp_path, True)[2][0].command[-1]) == ("telling", "every")
    assert [task.command[-1] for task in found[3]] == list(DESIGNS)
    assert {task.reason for task in found[3]} == {"ncu is not installed"}
    assert "--clock-control none" in " ".join(found[3][0].command)
    for path in (
        part for tasks in found.values() for task in tasks for part in task.command if part.startswith("tests/")
    ):
        assert (ROOT / path).is_dir()


@pytest.mark.parametrize(
    "name", ["demo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("step", "serving"))]
)
def test_commands_take_their_options(name):
    (task,) = [task for tasks in slices(ROOT, False).values() for task in tasks if task.name == name]
    command = [part.replace("{limit}", "9") for part in task.command]
    subprocess.run([sys.executable, "-m", *command, "--help"], cwd=ROOT, check=True, capture_output=True)


def test_only_small_texts_are_packed(tmp_path):
    place = tmp_path / "place"
    for file, size in (
        ("gpu/a.json", 3),
        ("gpu/big.log", bench.gpu.MAX_BYTES + 1),
        ("gpu/x.png", 3),
        ("gpu/.c/a.json", 3),
    ):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(b"1" * size)
    bench.gpu.pack(place, tmp_path / ARCHIVE)
    assert list(files_in(tmp_path / ARCHIVE)) == ["gpu/a.json"]


def test_files_that_vanish_while_they_are_packed_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    for name in ("a.json", "b.json"):
        (tmp_path / "gpu" / name).write_text("1")
    add = tarfile.TarFile.add

    def vanishing(packed, file, name):
        if name == "gpu/a.json":
            file.unlink()
        add(packed, file, name)

    monkeypatch.setattr(tarfile.TarFile, "add", vanishing)
    bench.gpu.pack(tmp_path, tmp_path / ARCHIVE)
    assert list(files_in(tmp_path / ARCHIVE)) == ["gpu/b.json"]


@pytest.mark.parametrize("damage", [lambda found: b"no archive", lambda found: found[: len(found) // 2]])
def test_a_damaged_archive_is_one_error_and_stays(damage, on_a_gpu, tmp_path):
    assert bench.gpu.main(["--slice", "2", "--out", str(tmp_path)]) == 0
    damaged = damage((tmp_path / ARCHIVE).read_bytes())
    (tmp_path / ARCHIVE).write_bytes(damaged)
    with pytest.raises(CloraError, match="damaged archive"):
        bench.gpu.main(["--slice", "2", "--out", str(tmp_path)])
    assert (tmp_path / ARCHIVE).read_bytes() == damaged


def test_what_is_missing_is_named_before_anything_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.gpu.wheels, "missing", lambda: ["diffusers==1", "pydantic==2"])
    assert bench.gpu.main(["--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().out
    assert "missing here: diffusers==1, pydantic==2" in printed
    assert "pip download" in printed
    assert not (tmp_path / "out").exists()


def test_a_profiled_call_is_marked(monkeypatch):
    from bench import profiled

    log = []
    monkeypatch.setattr(profiled.designs, "make_inputs", lambda case, device: None)
    monkeypatch.setattr(
        profiled.designs, "providers", lambda case: {"ours_fused": lambda inputs: lambda: log.append("call")}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))
    assert profiled.main(["fused"], device="cpu") == 0
    assert log == ["call"] * 3 + ["start", "call", "stop"]
