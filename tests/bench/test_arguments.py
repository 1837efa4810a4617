"""Every command of bench/: its help, and wrong arguments, which are one line and exit code 2, and leave everything as it is."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from bench import wheels
from bench.arguments import RESULTS
from bench.machine import ROOT

pytest.importorskip("pydantic")
pytest.importorskip("diffusers")
pytest.importorskip("triton")

STARTS = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
COMMANDS = sorted(
    ".".join(file.relative_to(ROOT / "bench").with_suffix("").parts).removesuffix(".__main__")
    for file in (ROOT / "bench").rglob("*.py")
    if file.name == "__main__.py" or STARTS.search(file.read_text("utf-8"))
)
NUMBERS = ("0", "-1", "1.5", "many", "9" * 12)
DURATIONS = ("0", "-1", "nan", "inf", "soon")
FOLDERS = ("file", "file/below")
DEVICES = ("cuda", "cuda:1", "cuda:x", "cpu:0", "mps", "a gpu")
UNMEASURED = ("no-such-folder", "empty", "file", str(RESULTS / "cpu"))
WORKER = ("step.worker", "step-3m", "three_copies")
MEASURE = ("worker", "folder", "--budget-s", "9", "--cases", "designs")
WRONG = [
    *(("compose", *option) for option in product(["--updates"], NUMBERS)),
    *(("compose", *option) for option in product(["--seeds"], ["-1", "x", str(2**31)])),
    *(("compose", *option) for option in product(["--out", "--folder"], FOLDERS)),
    ("compose", "--seeds", "0"),
    ("compose", "--folder", "empty"),
    ("compose", "sing"),
    ("compose",),
    ("compose", "train", "--folder", "students", "--seeds", "0"),
    *(("design_table", folder) for folder in UNMEASURED),
    ("design_table",),
    *(("gpu", *option) for option in product(["--budget-s"], [*DURATIONS, "30"])),
    *(("gpu", *option) for option in product(["--slice"], ["0", "6", "x"])),
    *(("gpu", *option) for option in product(["--out"], FOLDERS)),
    ("gpu", "--out", "new"),
    *(("host", *option) for option in product(["--rounds"], NUMBERS)),
    *(("precision", *option) for option in product(["--tokens"], [*NUMBERS, "255", "512"])),
    *(("precision", *option) for option in product(["--out"], FOLDERS)),
    ("profiled",),
    ("profiled", "quick"),
    ("profiled", "fused"),
    *(("report", folder) for folder in UNMEASURED),
    ("report",),
    *(("serving", *option) for option in product(["--adapters", "--requests", "--rounds"], NUMBERS)),
    *(("serving", *option) for option in product(["--budget-s"], DURATIONS)),
    *(("serving", *option) for option in product(["--device"], DEVICES)),
    *(("serving", *option) for option in product(["--out"], [*FOLDERS, "cpu-is-a-file"])),
    ("serving", "--requests", "3"),
    *((name, *option) for name in ("step", "step.run") for option in product(["--rounds", "--updates"], NUMBERS)),
    *((name, *option) for name in ("step", "step.run") for option in product(["--budget-s"], DURATIONS)),
    *((name, *option) for name in ("step", "step.run") for option in product(["--device"], DEVICES)),
    *((name, *option) for name in ("step", "step.run") for option in product(["--out"], [*FOLDERS, "cpu-is-a-file"])),
    *((name, "--only", "nothing") for name in ("step", "step.run")),
    ("step", "--updates", "1"),
    ("step", "--updates", "2"),
    *((*WORKER, *option) for option in product(["--updates"], NUMBERS)),
    *((*WORKER, *option) for option in product(["--device"], DEVICES)),
    (*WORKER, "--dtype", "int8"),
    ("step.worker", "step-3g", "three_copies"),
    ("step.worker", "step-3m", "four_copies"),
    *(("teachers", *option) for option in product(["--rounds"], [*NUMBERS, "1"])),
    *(("teachers", *option) for option in product(["--out"], FOLDERS)),
    *(("update", *option) for option in product(["--rounds"], [*NUMBERS, "1"])),
    *(("update", *option) for option in product(["--against"], ["no-such-folder", "empty", "file"])),
    *(("update", *option) for option in product(["--out"], FOLDERS)),
    *(("update_worker", "matching", *option) for option in product(["--rows"], ["0", "-1", "x"])),
    ("update_worker", "singing"),
    ("wheels", "all"),
    *((*MEASURE, *option) for option in product(["--budget-s"], DURATIONS)),
    (*MEASURE, "--cases", "some"),
    ("worker", "file", *MEASURE[2:]),
    MEASURE,
]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Returns call(command, *arguments), which runs it as ``python -m`` does, without a GPU; its code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(wheels, "missing", list)
    (tmp_path / "empty").mkdir()
    for file in ("file", "students/seed0", "cpu-is-a-file/cpu"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()

    def run(command, *arguments):
        file = find_spec(f"bench.{command}").origin.replace("__init__.py", "__main__.py")
        monkeypatch.setattr(sys, "argv", [file, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(file, run_name="__main__")
        return ended.value.code or 0, *capsys.readouterr()

    return run


def state(folder):
    """The files that a command could write, and when they were written."""
    places = [folder, RESULTS, wheels.TABLE, ROOT / "csrc_triton" / "multi_lora" / "designs.json"]
    files = [file for place in places for file in (place, *sorted(place.rglob("*")))]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_works(command, call):
    code, printed, errors = call(command, "--help")
    assert (code, errors) == (0, "")
    assert re.match(rf"usage: python -m bench\.{command.removesuffix('.run')} ", printed)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_and_each_of_its_values_is_tried(command, call):
    tried = {argument for name, *arguments in WRONG for argument in arguments if name == command}
    options = set(re.findall(r"^  (--[\w-]+) \S", call(command, "--help")[1], re.MULTILINE))
    assert tried
    assert options <= tried


@pytest.mark.parametrize("line", WRONG, ids=" ".join)
def test_a_wrong_argument_is_one_line_and_nothing_is_written(line, call, tmp_path):
    before = state(tmp_path)
    code, printed, errors = call(*line)
    assert (code, printed) == (2, "")
    *usage, message = errors.splitlines()
    assert not usage or line[0] == "update_worker", "a script without bench.arguments, for earlier commits"
    assert re.search(r"expected .*found|invalid choice|are required|unrecognized arguments", message), message
    assert usage or "; " in message, "what to do"
    assert state(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_refused(command, call, tmp_path):
    before = state(tmp_path)
    code, _, errors = call(command, "--no-such-option")
    assert (code, state(tmp_path)) == (2, before)
    assert "Traceback" not in errors


def test_a_gpu_that_is_there_is_taken(monkeypatch):
    from bench.arguments import device_here

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_here(name) for name in ("cpu", "cuda", "cuda:1")] == [
        torch.device(name) for name in ("cpu", "cuda", "cuda:1")
    ]
