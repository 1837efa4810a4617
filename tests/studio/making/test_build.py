"""The build's bookkeeping, and one pass through everything that is precomputed, with two teachers and one scene."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from clora.commands import demo
from clora.errors import CloraError
from clora.hashing import file_digest
from clora.studio import assets, baselines, evaluation, quality, targets
from clora.studio.demo_config import demo_config
from clora.studio.making import build, teachers
from clora.studio.teacher_files import load_teachers
from clora.studio.teachers import SPECS, TEACHERS

NAMES = ["sepia", "snow"]


@pytest.fixture
def stages(monkeypatch):
    """Three stages that write one file each; the runs are counted."""
    runs = []

    def make(name):
        def stage(folder, device):
            runs.append(name)
            (folder / name).write_text(f"{name} {len(runs)}")
            return {"number": 1.5}, [name]

        return stage

    needs = {"a": (), "b": ("a",), "c": ()}
    monkeypatch.setattr(build, "STAGES", {name: build.Stage(make(name), needed) for name, needed in needs.items()})
    return runs


def test_done_stages_are_passed_over_until_a_file_or_an_input_changes(stages, tmp_path):
    build.build(tmp_path)
    build.build(tmp_path)
    assert stages == ["a", "b", "c"]
    (tmp_path / "c").write_text("spoilt")
    build.build(tmp_path)
    assert stages[3:] == ["c"]
    build.build(tmp_path, ["a"])
    assert stages[4:] == ["a"]
    build.build(tmp_path)
    assert stages[5:] == ["b"], "b was made from the old a"
    recorded = assets.provenance(tmp_path)["b"]
    assert recorded["measured"] == {"number": 1.5}
    assert recorded["inputs"] == {"a": file_digest(tmp_path / "a")}
    assert assets.verified(tmp_path, "b") == tmp_path / "b"
    (tmp_path / "b").write_text("spoilt")
    with pytest.raises(CloraError, match="b is missing or not the file"):
        assets.verified(tmp_path, "b")


def test_a_stage_made_anew_takes_those_after_it_along(stages, tmp_path):
    build.build(tmp_path)
    (tmp_path / "a").write_text("spoilt")
    build.build(tmp_path)
    assert stages[3:] == ["a", "b"]
    assert all(build._is_done(tmp_path, name) for name in build.STAGES)


def test_a_stage_without_what_it_needs_is_refused(stages, tmp_path):
    with pytest.raises(CloraError, match=r"stage 'b' needs \['a'\] first.*--stages a"):
        build.build(tmp_path, ["b"])
    assert stages == []


def test_the_shipped_stages_belong_together():
    """None was made from files that have changed since."""
    folder = assets.ASSETS
    assert [name for name in build.STAGES if not build._is_done(folder, name)] == []
    assert targets.load_targets(folder).effects.keys() == set(TEACHERS)


def test_the_shipped_studio_was_measured_above_its_floors():
    recorded = assets.provenance(assets.ASSETS)
    measured = {name: value for entry in recorded.values() for name, value in entry["measured"].items()}
    assert all(measured[name] >= quality.FLOORS[name] for name in ("vae_psnr", "judge_accuracy", "general_accuracy"))
    assert measured["teacher_accuracy"].keys() == set(TEACHERS)
    assert min(measured["teacher_accuracy"].values()) >= quality.FLOORS["teacher_accuracy"]


def test_a_folder_without_a_studio_is_refused(tmp_path):
    with pytest.raises(CloraError, match="found no pipeline in it"):
        assets.load_studio(tmp_path)
    (tmp_path / assets.PROVENANCE).write_text("{")
    with pytest.raises(CloraError, match="cannot be read"):
        assets.provenance(tmp_path)


def test_an_unknown_stage_names_the_nearest(tmp_path):
    with pytest.raises(CloraError, match=r"unknown stage 'bases'.*'base'"):
        build.build(tmp_path, ["bases"])


@pytest.mark.slow
def test_what_is_precomputed_can_be_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "NUM_SCENES", 1)
    monkeypatch.setattr(evaluation, "NUM_GENERAL", 2)
    monkeypatch.setattr(targets, "TARGET_SOURCES", 2)
    monkeypatch.setattr(baselines, "TEACHER_STEPS", 2)
    adapter = assets.load_studio(assets.ASSETS)
    loras = load_teachers(adapter, assets.ASSETS, NAMES)
    rows = baselines.measure_baselines(adapter, loras, NAMES)
    assert list(rows) == ["teachers_80", "teachers_8", *baselines.MERGES, "base"]
    for row in rows.values():
        assert set(row.verdicts) == set(NAMES)
        assert all(len(verdicts) == 1 for verdicts in row.verdicts.values())
        assert all(picture.shape == (64, 64, 3) for picture in row.pictures.values())
    assert all(rows[name].megabytes > 0.1 for name in baselines.MERGES)
    different = np.abs(rows["teachers_80"].pictures["snow"].astype(int) - rows["base"].pictures["snow"])
    assert different.mean() > 1, "the teacher must do something"
    assert torch.isfinite(targets.target_sources(adapter)).all()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A copy of the shipped pipeline, and counts so small that every stage after the base takes seconds."""

    def config(names, seed, minutes=1.0):
        whole = demo_config(names, seed, minutes)
        changed = {"sampler": {"teacher_steps": 1}, "data": {"general_targets": 2}}
        return whole.model_copy(update={k: getattr(whole, k).model_copy(update=v) for k, v in changed.items()})

    monkeypatch.setattr(build, "demo_config", config)
    some = {"SPECS": SPECS[:4], "TEACHERS": TEACHERS[:4]}  # one of each format
    for module, counts in (
        (build, some | {"DEFAULT_EFFECTS": ("negative", "thermal")}),
        (quality, {"TEACHERS": some["TEACHERS"]}),
        (evaluation, {"NUM_SCENES": 1, "NUM_GENERAL": 2}),
        (targets, {"TARGET_SOURCES": 2}),
        (baselines, {"TEACHER_STEPS": 2}),
        (teachers, {"UPDATES": 2, "PAIRS": 2}),
    ):
        for name, count in counts.items():
            monkeypatch.setattr(module, name, count)
    shutil.copytree(assets.ASSETS / "pipeline", tmp_path / "pipeline")
    shutil.copy(assets.ASSETS / assets.PROVENANCE, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_stages_after_the_base_and_the_check(tiny, monkeypatch, capsys):
    build.build(tiny, ["teachers", "targets", "baselines"])
    names = ["negative", "thermal", "blueprint", "sepia"]
    adapter = assets.load_studio(tiny)
    loras = load_teachers(adapter, tiny, names)
    assert {lora.format for lora in loras.values()} == {"diffusers", "kohya", "comfyui", "peft"}
    data = demo.demo_data(adapter, loras, build.demo_config(names, 0), tiny, recompute=False)
    assert data.targets.shape[:2] == (4, 2)
    monkeypatch.setattr(quality, "FLOORS", {"vae_psnr": 60.0, "judge_accuracy": 0.99, "teacher_accuracy": 0.0})
    with pytest.raises(CloraError, match="below the floor: vae_psnr;"):
        quality.check(tiny)
    assert "teacher sepia" in capsys.readouterr().out
