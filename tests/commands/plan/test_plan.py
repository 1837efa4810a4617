"""``clora plan``: every problem at once, and its output."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import save_file
from typer.testing import CliRunner

from clora.cli import app
from clora.commands.plan.make import _parameters, make_plan
from clora.errors import CloraError
from clora.lora.save import save_lora
from clora.models.loading import load_pipeline
from clora.models.skeleton import torchvision_command
from clora.testing import (
    MAX_SEQUENCE_LENGTH,
    random_lora,
    tiny_pipeline,
)

RANK = 4


def test_a_plan_reads_no_weights(job, tmp_path, tiny_folder):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found = make_plan(job(pipeline=str(bare)))
    assert found["problems"] == []
    assert found["model"]["pipeline"] == "Flux2KleinPipeline"
    assert found["model"]["parameters"] == sum(p.numel() for p in tiny_pipeline().transformer.parameters())
    assert found["model"]["tokens"] == 16 + 16 + MAX_SEQUENCE_LENGTH
    assert found["passes"]["rendering"] == 2 * 4 * 2 * 2  # effects, pictures, steps, with and without the prompt
    parts = found["memory"]
    together = sum(size for name, size in parts.items() if name not in ("encoders", "rendering", "peak", "device"))
    assert parts["peak"] == max(parts["encoders"], parts["rendering"], together)
    assert parts["rendering"] > parts["base"] + parts["teachers"]
    assert not (tmp_path / "out").exists()


def test_every_problem_is_reported_at_once(job, tmp_path):
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    save_lora(random_lora(tiny_pipeline().transformer, 2, 0), tmp_path / "good.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a safetensors file")
    effects = [
        {"name": "a", "lora": str(tmp_path / "missing.safetensors"), "prompt": "make it snow"},
        {"name": "b", "lora": str(tmp_path / "broken.safetensors"), "prompt": "snow " * 60, "student_prompts": ["q"]},
        {"name": "c", "lora": str(tmp_path / "good.safetensors"), "prompt": "p", "sources": str(tmp_path / "none")},
    ]
    config = job(effects, student={"rank": 4, "targets": ("to_nothing",)}, data={"general_instructions": "no.txt"})
    problems = make_plan(config)["problems"]
    for text in (
        f"data.sources: {tmp_path / 'images' / 'empty.png'} is empty",
        f"effects.0.lora: {tmp_path / 'missing.safetensors'} does not exist",
        "broken.safetensors is not a readable safetensors file",
        "expected a prompt of at most 40 tokens",
        f"effects.2.sources: {tmp_path / 'none'}: expected a folder of images",
        "data.general_instructions: no.txt does not exist; expected a text file",
        "to_nothing",
    ):
        assert sum(text in problem for problem in problems) == 1, (text, problems)
    assert len(problems) == len(set(problems))


def test_prompts_that_are_too_long_are_one_problem_with_the_largest_need(job):
    (problem,) = make_plan(job(data={"max_sequence_length": 9}))["problems"]
    longest = re.search(r"found (\d+) in '.*' \(\d+ more are too long\)", problem)
    assert problem.endswith(f"; shorten it or raise data.max_sequence_length to {longest[1]}")
    assert make_plan(job(data={"max_sequence_length": int(longest[1])}))["problems"] == []


def test_pictures_are_reported_by_the_setting_that_names_them(job, tmp_path):
    (tmp_path / "before").mkdir()
    own = {"sources": str(tmp_path / "before"), "targets": str(tmp_path / "gone")}
    effects = [{"name": "a", "lora": str(tmp_path / "snow.safetensors"), "prompt": "make it snow", **own}]
    assert make_plan(job(effects, data={"sources": str(tmp_path / "nowhere")}))["problems"] == [
        f"data.sources: {tmp_path / 'nowhere'}: expected a folder of images, found nothing",
        f"effects.0.sources: {tmp_path / 'before'} holds no images; put at least one PNG, JPEG or WebP file in it",
        f"effects.0.targets: {tmp_path / 'gone'}: expected a folder of images, found nothing",
    ]


def test_a_pipeline_that_cannot_be_read_is_a_problem_among_the_others(job, tmp_path):
    (tmp_path / "broken").mkdir()
    effects = [{"name": "a", "lora": "a", "prompt": "p", "sources": str(tmp_path / "none")}]
    problems = make_plan(job(effects, pipeline=str(tmp_path / "broken")))["problems"]
    assert any("is not a diffusers pipeline" in problem for problem in problems)
    assert any("none: expected a folder of images" in problem for problem in problems)


def test_a_component_of_an_unknown_class_is_a_problem(job, tmp_path, tiny_folder):
    folder = tmp_path / "later"
    shutil.copytree(tiny_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "LaterForCausalLM"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (problem,) = make_plan(job(pipeline=str(folder)))["problems"]
    assert "text_encoder cannot be loaded as LaterForCausalLM" in problem


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("2.13.0", "pip install torch==2.13.0 torchvision"),
        ("2.13.0+cpu", "pip install torch==2.13.0 torchvision --index-url https://download.pytorch.org/whl/cpu"),
        ("2.15.0+cu132", "pip install torch==2.15.0 torchvision --index-url https://download.pytorch.org/whl/cu132"),
    ],
)
def test_torchvision_of_the_same_release_and_build(version, command):
    """The installed torch satisfies the pin, whatever its build, so that pip keeps it."""
    assert torchvision_command(version) == command
    wanted = SpecifierSet(command.split()[2].removeprefix("torch"))
    assert wanted.contains(version)


@pytest.mark.parametrize("version", ["2.13.0a0+git1f2e3d4", "2.9.0a0+50eac811a6.nv25.09", "2.15.0.dev20261101+cu130"])
def test_no_command_is_made_up_for_a_torch_that_no_release_index_has(version):
    advice = torchvision_command(version)
    assert version in advice
    assert "pip install" not in advice


def test_a_processor_without_torchvision_states_what_to_install(job, tmp_path, tiny_folder, monkeypatch):
    def needs_torchvision(folder):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr("transformers.Qwen2VLProcessor.from_pretrained", needs_torchvision)
    folder = tmp_path / "qwen"
    shutil.copytree(tiny_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (problem,) = make_plan(job(pipeline=str(folder)))["problems"]
    assert f"as Qwen2VLProcessor: it needs torchvision; {torchvision_command(torch.__version__)}" in problem
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loads weights"))
    with pytest.raises(CloraError) as told:
        load_pipeline(str(folder), "cpu")
    assert str(told.value) == problem


def test_minutes_bound_the_training_but_not_the_rendering(job):
    """At the rate of this machine, which is measured: one update of this model takes less than a minute anywhere."""
    long = make_plan(job(train={"updates": 10**9, "minutes": 3}))["time"]
    assert long["all"] == pytest.approx(3 * 60 + long["rendering"])
    short = make_plan(job(train={"updates": 2, "minutes": 30}))
    assert short["passes"]["all"] == short["passes"]["rendering"] + 2 * short["passes"]["update"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(20_430_000_000, "20.43 B"), (3_140_000, "3.14 M"), (999_000_000, "999 M"), (60_500, "60.5 K")],
)
def test_parameters_are_shown_in_their_unit(count, shown):
    assert _parameters(count) == f"{shown} parameters"


def test_chosen_rows_fit_beside_what_a_run_has_loaded(job, monkeypatch):
    config = job(train={"gradient_checkpointing": True})
    found = make_plan(config)
    assert found["rows"]["with gradient"] > 1
    loaded = sum(found["memory"][part] for part in ("base", "teachers", "student and critic"))
    monkeypatch.setattr("clora.commands.plan.cost.device_memory", lambda device: loaded + 1)
    assert make_plan(config)["rows"]["with gradient"] == 1


def test_too_little_memory_is_reported_with_what_helps(job, monkeypatch):
    monkeypatch.setattr("clora.commands.plan.cost.device_memory", lambda device: 1000)
    (problem,) = make_plan(job())["problems"]
    assert "the device has 1 kB" in problem
    assert "train.gradient_checkpointing=true" in problem


def test_the_command(job, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(job().model_dump(mode="json")))
    runner = CliRunner()
    result = runner.invoke(app, ["plan", str(file), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["time"]["flops_per_second"] > 1e6
    result = runner.invoke(app, ["plan", str(file), "effects.0.lora=nowhere.safetensors"])
    assert result.exit_code == 1
    assert "1 problem" in result.output
    assert "device memory" in result.output


def test_files_and_layers_are_checked_where_the_size_is_wrong(job, tmp_path):
    """Size, LoRA files, what these change and targets are wrong: none hides another."""
    save_file(
        {"other.lora_A.weight": torch.ones(2, 8), "other.lora_B.weight": torch.ones(8, 2)}, tmp_path / "o.safetensors"
    )
    effects = [
        {"name": name, "lora": str(tmp_path / f"{name}.safetensors"), "prompt": "p", "student_prompts": [name]}
        for name in ("gone", "o")
    ]
    student = {"rank": RANK, "targets": ("to_nothing",)}
    problems = make_plan(job(effects, data={"size": (17, 16)}, student=student))["problems"]
    for text in (
        "data.size: expected multiples of 4 pixels, found 17x16",
        f"effects.0.lora: {tmp_path / 'gone.safetensors'} does not exist",
        "o.safetensors: no key fits the model",
        "to_nothing",
    ):
        assert sum(text in problem for problem in problems) == 1, (text, problems)


def test_files_are_checked_where_the_config_is_refused(job, tmp_path):
    file = tmp_path / "my.yaml"
    tree = job().model_dump(mode="json")
    tree["effects"][1] |= {"lora": str(tmp_path / "gone.safetensors"), "sources": 3}
    tree["effects"].append("nothing")
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    file.write_text(json.dumps(tree | {"seed": "x"}))
    result = CliRunner().invoke(app, ["plan", str(file), "train.updates=many"])
    told = str(result.exception)
    for text in (
        f"{file}: seed: expected a whole number",
        "override 'train.updates=many': train.updates: expected",
        f"{file}: effects.1.sources: expected text",
        f"effects.1.lora: {tmp_path / 'gone.safetensors'} does not exist",
        f"data.sources: {tmp_path / 'images' / 'empty.png'} is empty",
    ):
        assert told.count(text) == 1, (text, told)
    file.write_text("effects: [")
    assert "not valid YAML" in str(CliRunner().invoke(app, ["plan", str(file)]).exception)
