"""The command line: the arguments reach the engine, and every mistake is one line and exit code 1."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import clora
from clora.cli import main

CONFIG = """
pipeline: base
output: {out}
effects: [{{name: snow, lora: a.safetensors, prompt: make it snow}}]
data: {{sources: photos, size: [64, 64], general_instructions: [brighten it]}}
student: {{rank: 8}}
train: {{updates: 10}}
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Returns run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["clora", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def engine(monkeypatch):
    """Returns engine(module, function): replaces the module and collects the arguments of its function's calls."""

    def fake(module, function):
        calls = []
        made = ModuleType(module)
        setattr(made, function, lambda *arguments: calls.append(arguments) or Path("/studio"))
        monkeypatch.setitem(sys.modules, module, made)
        return calls

    return fake


@pytest.fixture
def lora(tmp_path):
    """A small readable LoRA file."""
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 16),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(16, 4),
    }
    save_file(tensors, tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


@pytest.mark.parametrize(
    "command",
    [(), ("demo",), ("try",), ("distill",), ("prompts",), ("inspect",), ("export",), ("studio",), ("studio", "build")],
)
def test_help(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage" in out
    assert command == ("studio",) or "Example" in out


def test_version(run):
    assert run("--version") == (0, f"clora {clora.__version__}\n", "")


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "clora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"clora {clora.__version__}\n"


def test_shells_can_complete_the_command(run):
    assert "--install-completion" in run("--help")[1]


def test_usage_error(run):
    code, _, err = run("demo", "--sed", "1")
    assert code == 2
    assert "--seed" in err


def test_inspect(run, lora):
    code, out, err = run("inspect", lora)
    assert (code, err) == (0, "")
    assert "diffusers" in out
    code, out, _ = run("inspect", lora.parent, "--json")
    assert code == 0
    assert json.loads(out)["ranks"] == {"4": 1}


def test_inspect_against_a_pipeline(run, lora, tmp_path):
    code, _, err = run("inspect", lora, "--pipeline", tmp_path)
    assert code == 1
    assert "not a diffusers pipeline" in err


def test_inspect_shows_and_refuses_an_unusable_file(run, tmp_path):
    file = tmp_path / "bad.safetensors"
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(4, 16), f"{name}.lora_B.weight": torch.ones(16, 3)}, file)
    code, out, err = run("inspect", file, "--json")
    assert code == 1
    assert "rank mismatch" in json.loads(out)["problems"][0]
    assert err.startswith("error: ")
    assert "rank mismatch" in err
    assert "no LoRA module" not in err
    assert err.count(str(file)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.safetensors", None, "does not exist"),
        ("empty.safetensors", b"", "is empty (0 bytes)"),
        ("damaged.safetensors", b"\x08" * 40, "corrupt or truncated"),
        ("lora.pt", b"x", "is a pickle"),
        ("lora.txt", b"x", "not a .safetensors file"),
    ],
)
def test_inspect_bad_file(run, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run("inspect", tmp_path / name)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_output_that_cannot_be_written_is_one_line(lora):
    for options in ([], ["--json"]):
        command = [sys.executable, "-m", "clora", "inspect", str(lora), *options]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "error: the output cannot be written: No space left on device; make room where it goes\n"


def test_a_files_names_do_not_reach_the_terminal_as_commands(run, lora, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(load_file(lora) | {"\x1b[2Jx": torch.ones(1)}, file, {"\x1b[31m": "\x1b]0;title\x07"})
    code, out, err = run("inspect", file)
    assert code == 1
    assert "\x1b" not in out + err
    assert r"\x1b[2Jx" in out
    err = run("export", file, "--output", tmp_path / "b.safetensors")[2]
    assert "\x1b" not in err
    assert r"\x1b[2Jx" in err


def test_ignore_reaches_inspect_and_export(run, lora, tmp_path):
    file = tmp_path / "more.safetensors"
    save_file(load_file(lora) | {"lora_te1_x.alpha": torch.ones(1)}, file)
    assert run("inspect", file)[0] == 1
    assert run("inspect", file, "--ignore", "lora_te")[0] == 0
    assert run("export", file, "--output", tmp_path / "out.safetensors")[0] == 1
    assert run("export", file, "--output", tmp_path / "out.safetensors", "--ignore", "lora_te")[0] == 0


def test_a_message_is_never_markup(run, tmp_path):
    err = run("inspect", tmp_path / "[red]x[/].safetensors")[2]
    assert "[red]x[/].safetensors" in err


def test_demo_arguments(run, engine, tmp_path):
    calls = engine("clora.commands.demo", "run_demo")
    arguments = ("--out", tmp_path / "o", "--seed", 3, "--effects", "a, b", "--full")
    assert run("demo", *arguments)[:2] == (0, "report: /studio\n")
    assert calls == [(tmp_path / "o", 3, ["a", "b"], True, "auto")]


def test_demo_bad_input(run, engine, tmp_path):
    calls = engine("clora.commands.demo", "run_demo")
    code, _, err = run("demo", "--out", tmp_path / "o", "--effects", " , ")
    assert (code, "expected names" in err) == (1, True)
    assert calls == []
    assert not (tmp_path / "o").exists()


def test_report(run, engine, tmp_path):
    calls = engine("clora.report.run_report", "write_run_report")
    assert run("report", tmp_path)[:2] == (0, "report: /studio\n")
    assert calls == [(tmp_path,)]


def test_try_arguments(run, engine, tmp_path):
    calls = engine("clora.commands.try_", "try_collection")
    options = ("--effects", "a, b", "--out", "o.png", "--pictures", "p", "--seed", 3, "--pipeline", "me/base")
    assert run("try", "me/collection", tmp_path / "a.jpg", *options)[:2] == (0, "sheet: /studio\n")
    assert run("try")[0] == 0
    chosen = ("me/collection", tmp_path / "a.jpg", ["a", "b"], Path("o.png"), Path("p"), 3, "auto", "me/base")
    assert calls == [chosen, (None, None, None, Path("sheet.png"), None, 0, "auto", None)]


def test_distill(run, engine, tmp_path):
    calls = engine("clora.commands.distill", "distill")
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG.format(out=tmp_path / "out"))
    assert run("distill", file, "train.updates=5", "seed=2")[:2] == (0, "collection: /studio\n")
    assert run("distill", file, "--push-to-hub", "me/collection", "--private")[0] == 0
    ((config, nowhere, *_), (_, *destination)) = calls
    assert (config.train.updates, config.seed) == (5, 2)
    assert (nowhere, destination) == (None, ["me/collection", True, False])


def test_a_preset_is_stated_and_used(run, engine, tmp_path):
    calls = engine("clora.commands.distill", "distill")
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG.format(out=tmp_path / "out"))
    code, out, err = run("distill", file, "--preset", "paper", "train.updates=5")
    assert (code, out) == (0, "collection: /studio\n")
    assert "preset paper sets\n  data.sources_per_effect=20" in err
    assert "train.updates=5 instead of 5000" in err
    assert calls[0][0].train.weight_decay == 0.01
    assert "preset: expected clora or paper" in run("plan", file, "--preset", "mine")[2]


def test_the_example_is_printed(run, tmp_path):
    code, out, _ = run("distill", "--example")
    assert code == 0
    (tmp_path / "my.yaml").write_text(out, "utf-8")
    assert clora.load_config(tmp_path / "my.yaml").student.rank == 64


def test_distill_bad_input(run, engine, tmp_path):
    calls = engine("clora.commands.distill", "distill")
    file = tmp_path / "c.yaml"
    code, _, err = run("distill", file)
    assert (code, "does not exist" in err) == (1, True)
    file.write_text(CONFIG.format(out=file))
    code, _, err = run("distill", file, "train.updats=5")
    assert (code, "did you mean 'updates'" in err) == (1, True)
    assert calls == []


def test_a_bad_config_has_the_same_message_in_every_command(run, tmp_path):
    """It also lists what is wrong with the files that the config names."""
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG.format(out=tmp_path / "out"))
    (message,) = {run(command, file, "train.updats=5")[2] for command in ("plan", "distill", "prompts")}
    assert "did you mean 'updates'" in message
    assert "and of the files that it names:" in message
    assert f"effects.0.lora: {tmp_path}/a.safetensors" in message


def test_studio(run, engine, tmp_path):
    builds = engine("clora.studio.making.build", "build")
    assert run("studio", "build", tmp_path, "--stages", "vae,base", "--photos", tmp_path / "photos")[0] == 0
    assert run("studio", "build", tmp_path)[0] == 0
    assert builds == [(tmp_path, ["vae", "base"], "auto", tmp_path / "photos"), (tmp_path, None, "auto", None)]
    # Without a folder, what ships would be overwritten.
    assert run("studio", "build")[0] == 2
    assert len(builds) == 2
    checks = engine("clora.studio.check", "check")
    assert run("studio", "check", "--device", "cuda:1")[0] == 0
    assert checks == [(None, "cuda:1")]
    examples = engine("clora.studio.example", "write_example")
    assert run("studio", "example", tmp_path, "--effects", "snow,mirror")[:2] == (0, "/studio\n")
    assert run("studio", "example", tmp_path, "--studio", tmp_path / "mine")[0] == 0
    assert examples == [(tmp_path, None, ["snow", "mirror"]), (tmp_path, tmp_path / "mine", None)]
    engine("clora.studio.assets", "pipeline_folder")
    assert run("studio", "path") == (0, "/studio\n", "")
