"""Targets and baselines of the demo: made by the studio's own LoRAs, kept as files, read back as training data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.studio import random_teachers
from safetensors.numpy import load_file

from clora.hashing import file_digest
from clora.models.loading import load_pipeline
from clora.studio import baselines, evaluation, targets
from clora.studio.assets import PROVENANCE, pipeline_folder, studio_adapter
from clora.studio.demo_config import DEFAULT_EFFECTS, demo_config
from clora.studio.effects import EFFECTS
from clora.studio.making import build
from clora.studio.photographs import load_photographs
from clora.studio.results import Measured
from clora.studio.teachers import TEACHERS

NAMES = ("thermal", "snow")


@pytest.fixture(scope="module")
def adapter():
    return studio_adapter(load_pipeline(str(pipeline_folder()), "cpu"))


@pytest.fixture
def loras(adapter):
    return random_teachers(adapter.pipeline.transformer, NAMES)


@pytest.fixture
def small(monkeypatch, adapter, loras):
    def config(names, seed, full=False):
        whole = demo_config(names, seed, full)
        changed = {"sampler": {"teacher_steps": 1}, "data": {"general_targets": 3}}
        return whole.model_copy(update={k: getattr(whole, k).model_copy(update=v) for k, v in changed.items()})

    monkeypatch.setattr(targets, "TARGET_SOURCES", 2)
    monkeypatch.setattr(evaluation, "NUM_SCENES", 2)
    monkeypatch.setattr(evaluation, "NUM_GENERAL", 2)
    monkeypatch.setattr(baselines, "TEACHER_STEPS", 1)
    monkeypatch.setattr(baselines, "STEPS", 1)
    monkeypatch.setattr(build, "demo_config", config)
    monkeypatch.setattr(build, "DEFAULT_EFFECTS", NAMES)
    monkeypatch.setattr(build, "load_studio", lambda folder, device: adapter)
    monkeypatch.setattr(build, "load_teachers", lambda *arguments: loras)
    return config


def make(name, folder):
    measured, files = build.STAGES[name].make(folder, torch.device("cpu"), load_photographs())
    record = {name: {"sha256": {file: file_digest(folder / file) for file in files}}}
    (folder / PROVENANCE).write_text(json.dumps(record))
    return measured


def test_targets_become_training_data(small, adapter, tmp_path):
    assert make("targets", tmp_path) == {"sources_per_effect": 2, "general": 3}
    made = targets.load_targets(tmp_path)
    assert made.effects.keys() == set(NAMES)
    assert made.effects["snow"].shape == (2, 64, 128)
    assert not torch.equal(made.effects["snow"], made.effects["thermal"])
    config = small(NAMES[:1], 0)
    data = targets.training_data(adapter, NAMES[:1], config, made)
    assert data.effects == ("thermal",)
    torch.testing.assert_close(data.targets[0], made.effects["thermal"])
    assert len(data.general_targets) == 3


def test_baselines_are_judged_and_kept(small, adapter, tmp_path):
    measured = make("baselines", tmp_path)
    assert measured.keys() == {"teachers_80", "teachers_8", *baselines.MERGES, "base"}
    pictures = load_file(tmp_path / "baselines.safetensors")
    stored = json.loads((tmp_path / "baselines.json").read_text())
    for method, values in stored.items():
        row = Measured.from_json(values, {name: pictures[f"{method}/{name}"] for name in NAMES}).row()
        assert row["psnr"] == pytest.approx(measured[method]["psnr"], abs=1e-4)
        assert row["per_effect"] == measured[method]["per_effect"]
        assert row["outputs"] == 2 * 2 * evaluation.NOISES
        assert (row["general_accuracy"] is None) == method.startswith("teachers")
    assert pictures["base/snow"].dtype == np.uint8
    assert stored["merge_svd"]["megabytes"] > 0


def test_rows_share_scenes_and_noise(small, adapter):
    rows = baselines.EvaluationSet.encode(adapter, NAMES)
    assert len(rows.ids) == len(set(rows.seeds)) == 8
    torch.testing.assert_close(rows.sources[0], rows.sources[2])  # the first scene, for another noise
    torch.testing.assert_close(rows.sources[0], rows.sources[4])  # and for the other effect
    assert (rows.sources[0] - rows.sources[1]).abs().max() > 0.1


def test_the_demo_has_effects_of_chance():
    assert set(DEFAULT_EFFECTS) <= set(TEACHERS)
    assert len(DEFAULT_EFFECTS) == 8
    assert sum(EFFECTS[name].stochastic for name in DEFAULT_EFFECTS) >= 2
    assert len(DEFAULT_EFFECTS) * evaluation.NUM_SCENES * evaluation.NOISES == 768
    config = demo_config(DEFAULT_EFFECTS, 3)
    assert config.train.minutes is None
    assert config.seed == 3
    assert demo_config(DEFAULT_EFFECTS, 3, full=True).train.updates > config.train.updates
