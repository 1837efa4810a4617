"""The fifty teachers: their specs, their pairs, training that goes on where it stopped, what they are measured by."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.studio import random_teachers

from clora.errors import CloraError
from clora.models.loading import load_pipeline
from clora.studio import quality
from clora.studio.assets import pipeline_folder, studio_adapter
from clora.studio.demo_config import DEFAULT_EFFECTS
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import held_out_sources
from clora.studio.making import build, teachers
from clora.studio.photographs import load_photographs
from clora.studio.scenes import make_scene, render
from clora.studio.teacher_files import load_teachers, save_teacher
from clora.studio.teachers import COLOUR_MAPS, PAIRS, SPECS, TEACHERS, kind_of

THERMAL, SNOW = (SPECS[TEACHERS.index(effect)] for effect in ("thermal", "snow"))


class Stopped(Exception):
    """Stands for a machine that stops."""


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(str(pipeline_folder()), "cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(teachers, "PAIRS", dict.fromkeys(PAIRS, 2))
    monkeypatch.setattr(teachers, "UPDATES", 4)
    monkeypatch.setattr(teachers, "CHECKPOINT_EVERY", 2)


def test_fifty_teachers_of_the_library():
    assert len(SPECS) == len(set(TEACHERS)) == 50
    assert set(TEACHERS) <= set(EFFECTS)
    assert sum(EFFECTS[effect].stochastic for effect in TEACHERS) == 16
    formats = [spec.format for spec in SPECS]
    assert {name: formats.count(name) for name in set(formats)} == {
        "diffusers": 13,
        "kohya": 13,
        "peft": 12,
        "comfyui": 12,
    }
    assert {spec.rank for spec in SPECS} == {8, 12, 16}
    assert 1 < sum(spec.attention_only for spec in SPECS) < 10
    assert {kind_of(effect) for effect in COLOUR_MAPS} == {"colour"}
    assert {kind_of(effect) for effect in TEACHERS} == set(PAIRS)


def test_groups_hold_every_teacher_once():
    groups = teachers.groups(SPECS)
    assert sorted(spec.effect for group in groups for spec in group) == sorted(TEACHERS)
    for group in groups:
        assert len(group) <= teachers.GROUP
        assert len({teachers.num_pairs(spec) for spec in group}) == 1
    # The demo's are there early.
    early = {spec.effect for name in ("teachers-1", "teachers-2") for spec in build.TEACHER_STAGES[name]}
    assert set(DEFAULT_EFFECTS) <= early
    assert build.STAGES["targets"].needs == ("vae", "text", "base", "teachers-1", "teachers-2")


def test_pairs_are_exact_and_a_teachers_own(small):
    photographs = load_photographs()
    drawn = {size: teachers.draw_pairs(SNOW, size, photographs) for size in (64, 128)}
    before, after = drawn[64]
    assert before.shape == after.shape == (2, 64, 64, 3)
    first = teachers.FIRST_SCENE + 1000 * TEACHERS.index("snow")
    np.testing.assert_array_equal(before[1], render(make_scene(first + 1, "train"), 64))
    np.testing.assert_array_equal(after, teachers.draw_pairs(SNOW, 64, photographs)[1])
    # The same scenes at both sizes.
    halved = drawn[128][0].reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.sqrt(((halved - before) ** 2).mean()) < 0.05
    assert np.abs(teachers.draw_pairs(THERMAL, 64, photographs)[0] - before).mean() > 0.01
    assert max(PAIRS.values()) < 1000


def test_stopped_teachers_go_on(small, pipeline, tmp_path):
    reported = []

    def train(name, last=None, pipeline=pipeline):
        def report(update, values):
            reported.append(update)
            if update == last:
                raise Stopped

        return teachers.train_group(pipeline, (THERMAL, SNOW), 0, tmp_path / name, load_photographs(), report)

    whole = train("whole.safetensors")
    assert list(whole) == ["thermal", "snow"]
    assert all(module.lora_B.any() for state in whole.values() for module in state.modules.values())
    with pytest.raises(Stopped):
        train("state.safetensors", last=3)
    reported.clear()
    resumed = train("state.safetensors")
    assert reported == [3, 4]
    for effect, state in whole.items():
        for name, module in state.modules.items():
            assert torch.equal(resumed[effect].modules[name].lora_A, module.lora_A)
            assert torch.equal(resumed[effect].modules[name].lora_B, module.lora_B)
    # Not on another base.
    changed = load_pipeline(str(pipeline_folder()), "cpu")
    changed.transformer.proj_out.weight.data.mul_(2)
    with pytest.raises(CloraError, match="pipeline was .* is "):
        train("state.safetensors", pipeline=changed)


def test_a_loss_that_is_not_finite_names_the_teacher(small, pipeline, tmp_path, monkeypatch):
    encode = teachers.encode_pairs

    def broken(adapter, *rest):
        pairs = encode(adapter, *rest)
        targets = pairs.targets.clone()
        targets[1] = torch.nan
        return dataclasses.replace(pairs, targets=targets)

    monkeypatch.setattr(teachers, "encode_pairs", broken)
    with pytest.raises(CloraError, match="update 1: the loss of LoRA 'snow' is not finite"):
        teachers.train_group(
            pipeline, (THERMAL, SNOW), 0, tmp_path / "state.safetensors", load_photographs(), lambda *_: None
        )


@pytest.mark.parametrize("spec", SPECS[:4], ids=lambda spec: spec.format)
def test_formats_round_trip(spec, pipeline, tmp_path):
    state = random_teachers(pipeline.transformer, [spec.effect])[spec.effect]
    save_teacher(spec, state, tmp_path / "teachers")
    loaded = load_teachers(studio_adapter(pipeline), tmp_path, [spec.effect])[spec.effect]
    assert set(loaded.modules) == set(state.modules)
    for name, module in state.modules.items():
        torch.testing.assert_close(loaded.modules[name].delta(), module.delta(), rtol=1e-2, atol=1e-4)


def test_exact_pictures_are_right_and_above_the_floors(pipeline, monkeypatch):
    effects = ("thermal", "pixelate", "snow")

    def exact(adapter, loras, count):
        rng = np.random.default_rng(9)
        sources = held_out_sources(count, 64)
        return {effect: np.stack([EFFECTS[effect].apply(source, rng) for source in sources]) for effect in loras}

    monkeypatch.setattr(quality, "teacher_outputs", exact)
    measured = quality.teacher_quality(studio_adapter(pipeline), dict.fromkeys(effects), 2)
    assert [found.accuracy for found in measured.values()] == [1, 1, 1]
    for effect in ("thermal", "pixelate"):
        found = measured[effect]
        assert found.psnr == 100 > quality.psnr_floor(effect, found.ceiling)
        assert 15 < found.ceiling < 60
    assert measured["snow"] == quality.TeacherQuality(1)
    assert quality.psnr_floor("snow", None) is None
    styles = [row.style for row in quality.teacher_table(measured).rows]
    assert styles == ["", "", ""]


def test_floors_of_steep_maps_follow_the_autoencoder():
    assert quality.psnr_floor("thermal", 27.7) == pytest.approx(23.7)
    assert quality.psnr_floor("sunset", 36.0) == 26
    assert quality.psnr_floor("emboss", 23.0) == 21
    low = quality.TeacherQuality(1.0, 23.0, 27.7)
    assert [row.style for row in quality.teacher_table({"thermal": low}).rows] == ["red"]


def test_teachers_make_pictures_of_every_source(pipeline, monkeypatch):
    monkeypatch.setattr(quality, "TEACHER_STEPS", 1)
    outputs = quality.teacher_outputs(
        studio_adapter(pipeline), random_teachers(pipeline.transformer, ["thermal", "snow"]), 2
    )
    assert list(outputs) == ["thermal", "snow"]
    assert outputs["snow"].shape == (2, 64, 64, 3)
    assert np.abs(outputs["snow"] - outputs["thermal"]).max() > 0.01


def test_the_stage_records_its_files(pipeline, tmp_path, monkeypatch, capsys):
    specs = SPECS[:3]
    monkeypatch.setitem(build.TEACHER_STAGES, "teachers-1", specs)
    monkeypatch.setattr(build, "load_studio", lambda folder, device: studio_adapter(pipeline))
    monkeypatch.setattr(
        teachers,
        "train_group",
        lambda *arguments: random_teachers(pipeline.transformer, [spec.effect for spec in specs]),
    )
    found = quality.TeacherQuality(0.5, 20.0, 30.0)
    monkeypatch.setattr(build, "teacher_quality", lambda adapter, loras, scenes: dict.fromkeys(loras, found))
    measured, files = build.STAGES["teachers-1"].make(tmp_path, torch.device("cpu"), load_photographs())
    for size in ("64", "128"):
        assert measured[size]["sepia"] == {"accuracy": 0.5, "psnr": 20.0, "ceiling": 30.0}
    folder = "teachers/sepia/adapter_"
    assert files == [
        "teachers/darkroom.safetensors",
        "teachers/thermal.safetensors",
        f"{folder}config.json",
        f"{folder}model.safetensors",
    ]
    assert all((tmp_path / file).exists() for file in files)
    assert "sepia" in capsys.readouterr().out
