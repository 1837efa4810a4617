"""The demo on the studio of photographs, with random teachers, two updates and one held-out scene."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers.studio import random_teachers
from PIL import Image

from clora.collection.metadata import LORA_FILE, read_collection
from clora.collection.write import make_collection, write_collection
from clora.commands import demo
from clora.data.generation import Generator
from clora.errors import CloraError
from clora.models.loading import load_pipeline
from clora.studio import assets, baselines, evaluation, targets
from clora.studio.assets import ASSETS
from clora.studio.demo_config import DEFAULT_EFFECTS, demo_config
from clora.studio.evaluation import held_out_sources
from clora.studio.pixels import to_bytes
from clora.studio.teacher_files import load_teachers, save_teacher, teacher_path
from clora.studio.teachers import SPECS, TEACHERS

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
        for name, state in random_teachers(adapter.pipeline.transformer, names).items():
            save_teacher(SPECS[TEACHERS.index(name)], state, tmp_path / "studio" / "teachers")
        return load_teachers(adapter, tmp_path / "studio", names)

    monkeypatch.setattr(demo, "demo_config", config)
    monkeypatch.setattr(demo, "load_teachers", teachers)
    monkeypatch.setattr(demo, "teacher_path", lambda folder, name: teacher_path(tmp_path / "studio", name))
    monkeypatch.setattr(evaluation, "NUM_SCENES", 1)
    monkeypatch.setattr(evaluation, "NUM_GENERAL", 2)
    monkeypatch.setattr(baselines, "TEACHER_STEPS", 1)
    monkeypatch.setattr(targets, "TARGET_SOURCES", 2)


@pytest.mark.slow
def test_the_demo_takes_what_ships(monkeypatch, tmp_path):
    def config(names, seed, full):
        whole = demo_config(names, seed, full)
        return whole.model_copy(update={"train": whole.train.model_copy(update={"updates": 2, "anchor_share": 0.5})})

    monkeypatch.setattr(demo, "demo_config", config)
    monkeypatch.setattr(evaluation, "NUM_SCENES", 1)
    report = demo.run_demo(tmp_path / "out", 0, None, full=False, device="cpu")
    metrics = json.loads((report.parent / "metrics.json").read_text())
    assert metrics["effects"] == list(DEFAULT_EFFECTS)
    assert metrics["targets_precomputed"] is True
    assert {row["method"] for row in metrics["rows"] if not row["precomputed"]} == {"clora"}
    assert all(row["outputs"] == 768 for row in metrics["rows"] if row["precomputed"])


@pytest.mark.slow
def test_the_demo_writes_everything_it_promises(short, tmp_path, capsys):
    report = demo.run_demo(tmp_path / "out", 3, NAMES, full=True, device="cpu")
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


def test_targets_are_rendered_where_some_do_not_ship(monkeypatch):
    made = targets.Targets({"thermal": torch.zeros(1, 1, 1)}, torch.zeros(1, 1, 1))
    monkeypatch.setattr(targets, "load_targets", lambda folder: made)
    assert demo.shipped_targets(ASSETS, ["thermal"]) is made
    assert demo.shipped_targets(ASSETS, NAMES) is None
    assert demo.shipped_rows(ASSETS, NAMES) is None


def test_an_unknown_effect_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CloraError, match=r"unknown effect 'sno'; .*; did you mean 'snow'.*\?$"):
        demo.run_demo(tmp_path / "out", 0, ["sno"], full=False)
    assert not (tmp_path / "out").exists()


def test_a_collection_that_is_there_is_replaced_with_notice(monkeypatch, tmp_path, capsys):
    (tmp_path / "collection").mkdir()
    (tmp_path / "collection" / LORA_FILE).write_bytes(b"an earlier demo's")
    monkeypatch.setattr(assets, "load_studio", None)  # the notice comes before any work
    with pytest.raises(TypeError):
        demo.run_demo(tmp_path, 0, None, full=False)
    assert "holds a finished demo, which this run replaces at its end" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CloraError, match="is a file"):
        demo.run_demo(tmp_path / "file", 0, None, full=False)


def test_the_threads_of_a_training_are_noted(monkeypatch, tmp_path):
    def train_student(config, adapter, teachers, data, report, start):
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)  # a number of its own
        report(1, {"loss": 0.0})
        torch.set_num_threads(before)

    monkeypatch.setattr(demo, "first_student", lambda *_: None)
    monkeypatch.setattr(demo, "train_student", train_student)
    for device, expected in (("cpu", torch.get_num_threads() + 1), ("cuda:0", None)):
        run = demo.Run(tmp_path, demo_config(["sepia"], 0).model_copy(update={"device": device}))
        demo.train(run, None, {"sepia": None}, None)
        assert run.threads == expected


def test_what_is_judged_are_the_stock_pipelines_results(short, monkeypatch, tmp_path):
    """Of the exported LoRA with its scheduler, given the noise that the stock call draws."""
    config = demo_config(["sepia"], 0).model_copy(update={"device": "cpu"})
    adapter = assets.load_studio(ASSETS, "cpu")
    loras = demo.load_teachers(adapter, ASSETS, ["sepia"])
    files = {"sepia": demo.teacher_path(ASSETS, "sepia")}
    described = make_collection(config, adapter, "studio", files, {"sepia": None})
    collection = write_collection(loras["sepia"], described, tmp_path / "out", torch.float32)
    torch.manual_seed(0)
    start = torch.randn(1, 128, 8, 8).flatten(2).mT  # the pipeline draws an image and makes it tokens
    noises = [start, *(torch.randn(1, 64, 128) for _ in range(7))]
    monkeypatch.setattr(Generator, "_noise", lambda self, seeds, draw=0: noises[draw].expand(len(seeds), -1, -1))
    measured, _ = demo.evaluate_collection(config, ASSETS, collection)
    pipe = load_pipeline(str(ASSETS / "pipeline"), "cpu")
    pipe.load_lora_weights(collection)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(collection / "scheduler")
    source = held_out_sources(1, 64)[baselines.grid_scene("sepia") % 1]
    expected = demo.stock_edit(pipe, config, source, config.effects[0].student_prompts[0], seed=0)
    found = measured.pictures["sepia"].astype(int)
    assert np.abs(found - to_bytes(expected)).max() <= 1
    assert np.abs(found - to_bytes(source)).mean() > 2, "the LoRA must be in the pipeline"
