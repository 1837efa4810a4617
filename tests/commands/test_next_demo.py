"""The demo on the studio of photographs, with random teachers, two updates and one held-out scene."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clora.collection.metadata import read_collection
from clora.commands import next_demo
from clora.errors import CloraError
from clora.studio.assets import ASSETS
from clora.studio.making.teachers import save_teacher
from clora.studio.next import baselines, evaluation, targets
from clora.studio.next.demo_config import demo_config
from clora.studio.next.making.teachers import fresh_loras
from clora.studio.next.teachers import SPECS, TEACHERS
from clora.studio.teachers import load_teachers, teacher_path

NAMES = ["thermal", "snow"]


@pytest.fixture
def short(monkeypatch, tmp_path):
    def config(names, seed, full):
        whole = demo_config(names, seed, full)
        changed = {
            "train": {"updates": 2, "anchor_share": 0.5},
            "sampler": {"teacher_steps": 1},
            "data": {"general_targets": 2},
        }
        return whole.model_copy(update={k: getattr(whole, k).model_copy(update=v) for k, v in changed.items()})

    def teachers(adapter, folder, names):
        generator = torch.Generator().manual_seed(0)
        specs = [SPECS[TEACHERS.index(name)] for name in names]
        for name, state in fresh_loras(adapter.pipeline.transformer, specs, generator).items():
            for module in state.modules.values():
                module.lora_B.normal_(std=0.02, generator=generator)
            save_teacher(SPECS[TEACHERS.index(name)], state, tmp_path / "studio" / "teachers")
        return load_teachers(adapter, tmp_path / "studio", names)

    monkeypatch.setattr(next_demo, "demo_config", config)
    monkeypatch.setattr(next_demo, "load_teachers", teachers)
    monkeypatch.setattr(next_demo, "teacher_path", lambda folder, name: teacher_path(tmp_path / "studio", name))
    monkeypatch.setattr(evaluation, "NUM_SCENES", 1)
    monkeypatch.setattr(evaluation, "NUM_GENERAL", 2)
    monkeypatch.setattr(baselines, "TEACHER_STEPS", 1)
    monkeypatch.setattr(targets, "TARGET_SOURCES", 2)


@pytest.mark.slow
def test_the_demo_writes_everything_it_promises(short, tmp_path, capsys):
    report = next_demo.run_demo(tmp_path / "out", 3, NAMES, full=True, device="cpu")
    assert "effect accuracy on held-out scenes: clora" in capsys.readouterr().out
    files = {"report.html", "grid.png", "metrics.json", "collection", "held-out"}
    assert {path.name for path in report.parent.iterdir()} == files
    metrics = json.loads((report.parent / "metrics.json").read_text())
    assert (metrics["seed"], metrics["device"], metrics["effects"], metrics["updates"]) == (3, "cpu", NAMES, 2)
    assert metrics["targets_precomputed"] is False
    assert {"load", "targets", "train", "export", "baselines", "evaluate"} <= metrics["seconds"].keys()
    rows = {row["method"]: row for row in metrics["rows"]}
    assert rows.keys() == {"teachers_80", "teachers_8", *baselines.MERGES, "base", "clora"}
    assert all(row["outputs"] == 2 * evaluation.NOISES for row in rows.values())
    assert all(len(row["intervals"]["effect_accuracy"]) == 2 for row in rows.values())
    assert metrics["against_teachers"]["psnr"]["mean"] == pytest.approx(
        rows["clora"]["psnr"] - rows["teachers_80"]["psnr"]
    )
    assert read_collection(report.parent / "collection").metrics["per_effect"] == rows["clora"]["per_effect"]
    assert np.asarray(Image.open(report.parent / "grid.png")).std() > 10
    assert 'src="http' not in report.read_text("utf-8"), "the report must open offline"


def test_unknown_effects_are_named():
    with pytest.raises(CloraError, match=r"unknown effect 'snwo'.*'snow'"):
        next_demo.check_effects(["snwo"])
    assert next_demo.check_effects(["snow", "snow"]) == ["snow"]


def test_targets_are_rendered_where_some_do_not_ship(monkeypatch):
    made = targets.Targets({"thermal": torch.zeros(1, 1, 1)}, torch.zeros(1, 1, 1))
    monkeypatch.setattr(targets, "load_targets", lambda folder: made)
    assert next_demo.shipped_targets(ASSETS, ["thermal"]) is made
    assert next_demo.shipped_targets(ASSETS, NAMES) is None
    assert next_demo.shipped_rows(ASSETS, NAMES) is None
