"""``clora demo`` from the shipped studio to the report, with two updates and one held-out scene."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clora.collection.metadata import LORA_FILE, read_collection
from clora.collection.write import make_collection, write_collection
from clora.commands import demo
from clora.errors import CloraError
from clora.flow.matching import student_schedule
from clora.lora.layers import linear_shapes
from clora.lora.load import read_lora
from clora.models.loading import load_pipeline
from clora.studio import assets, baselines, evaluation, targets
from clora.studio.demo_config import DEFAULT_EFFECTS, demo_config
from clora.studio.evaluation import held_out_sources

ROWS = {"teachers_80", "teachers_8", "merge_svd", "merge_ties_svd", "merge_dare_ties_svd", "base", "clora"}
COLUMNS = {
    "method",
    "precomputed",
    "files",
    "megabytes",
    "nfe",
    "effect_accuracy",
    "bad_case_rate",
    "psnr",
    "subject_alignment",
    "general_accuracy",
    "per_effect",
}


@pytest.fixture
def short(monkeypatch):
    """Two updates instead of minutes, one held-out scene and two general edits."""

    def config(names, seed, minutes=1.0):
        whole = demo_config(names, seed, minutes)
        changed = {
            "train": {"updates": 2, "anchor_share": 0.5, "minutes": None},
            "sampler": {} if minutes else {"teacher_steps": 1},
            "data": {} if minutes else {"general_targets": 2},
        }
        return whole.model_copy(update={k: getattr(whole, k).model_copy(update=v) for k, v in changed.items()})

    monkeypatch.setattr(demo, "demo_config", config)
    monkeypatch.setattr(evaluation, "NUM_SCENES", 1)
    monkeypatch.setattr(evaluation, "NUM_GENERAL", 2)
    monkeypatch.setattr(baselines, "TEACHER_STEPS", 1)


@pytest.mark.slow
def test_the_demo_writes_everything_it_promises(short, tmp_path, capsys):
    report = demo.run_demo(tmp_path / "out", 3, None, full=False, device="cpu")
    warning = "only 2 updates fitted into the time"
    assert warning in capsys.readouterr().err
    assert {p.name for p in report.parent.iterdir()} == {
        "report.html",
        "grid.png",
        "metrics.json",
        "collection",
        "held-out",
    }
    metrics = json.loads((report.parent / "metrics.json").read_text())
    assert (metrics["seed"], metrics["device"], metrics["effects"]) == (3, "cpu", list(DEFAULT_EFFECTS))
    assert metrics["targets_precomputed"] is True
    assert metrics["updates"] == 2
    assert (metrics["threads"], metrics["dtype"]) == (torch.get_num_threads(), "float32")
    assert metrics["warning"].startswith(warning)
    assert {"load", "targets", "train", "export", "evaluate"} <= metrics["seconds"].keys()
    assert 0 < metrics["peak_rss_mb"] < 6000
    rows = {row["method"]: row for row in metrics["rows"]}
    stated = read_collection(report.parent / "collection").metrics
    assert stated["per_effect"] == rows["clora"]["per_effect"]
    assert stated["general_accuracy"] == rows["clora"]["general_accuracy"]
    assert rows.keys() == ROWS
    assert all(row.keys() >= COLUMNS and row["per_effect"].keys() == set(DEFAULT_EFFECTS) for row in rows.values())
    assert {name for name, row in rows.items() if not row["precomputed"]} == {"clora"}
    assert rows["clora"]["files"] == 1
    assert np.asarray(Image.open(report.parent / "grid.png")).std() > 10
    assert 'src="http' not in report.read_text("utf-8"), "the report must open offline"


@pytest.mark.slow
def test_the_full_demo_makes_everything_anew(short, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "TARGET_SOURCES", 2)
    monkeypatch.setattr(targets, "load_targets", None)
    monkeypatch.setattr(demo, "shipped_rows", None)
    report = demo.run_demo(tmp_path / "out", 0, ["sepia", "snow"], full=True, device="cpu")
    metrics = json.loads((report.parent / "metrics.json").read_text())
    assert metrics["targets_precomputed"] is False
    assert {row["method"] for row in metrics["rows"]} == ROWS
    assert not any(row["precomputed"] for row in metrics["rows"])


def test_the_exported_lora_and_its_scheduler_are_what_is_judged(short, monkeypatch, tmp_path):
    config = demo_config(["sepia"], 0)
    lora = assets.ASSETS / "teachers" / "sepia"
    adapter = assets.load_studio(assets.ASSETS, "cpu")
    student = read_lora(lora, linear_shapes(adapter.pipeline.transformer))
    described = make_collection(config, adapter, "studio", {"sepia": lora}, {"sepia": None})
    collection = write_collection(student, described, tmp_path, torch.float32)
    loaded, merged = [], []

    def load(*arguments):
        loaded.append(load_pipeline(*arguments))
        own = [name for name, _ in loaded[0].transformer.named_modules()]
        loaded[0].transformer.register_forward_pre_hook(
            lambda module, args: merged.append([name for name, _ in module.named_modules()] == own)
        )
        loaded[0].transformer.register_forward_pre_hook(
            lambda module, args, kwargs: loaded.append(float(kwargs["timestep"][0])), with_kwargs=True
        )
        return loaded[0]

    monkeypatch.setattr(demo, "load_pipeline", load)
    config = config.model_copy(update={"device": "cpu"})
    outputs, _ = demo.run_collection(config, assets.pipeline_folder(), collection)
    assert loaded[1:9] == pytest.approx(student_schedule(8, 3.0).tolist(), abs=1e-6)
    assert all(merged), "without PEFT's layers"
    pipe = load_pipeline(str(assets.pipeline_folder()), "cpu")
    pipe.scheduler = loaded[0].scheduler
    source, prompt = held_out_sources(1)[0], config.effects[0].student_prompts[0]
    plain = demo.stock_edit(pipe, config, source, prompt, 0)
    assert np.abs(outputs["sepia"][0] - plain).mean() > 0.01, "the LoRA must be in the pipeline"
    pipe.load_lora_weights(collection)
    unmerged = demo.stock_edit(pipe, config, source, prompt, 0)
    assert np.abs(outputs["sepia"][0] - unmerged).max() <= 1e-5


@pytest.mark.parametrize(
    ("threads", "expected"),
    [(1, "the time on 1 of 2 threads, where"), (2, "the time, where"), (None, "the time, where")],
)
def test_too_few_updates_are_explained_by_the_threads(monkeypatch, tmp_path, threads, expected):
    monkeypatch.setattr(demo, "idle_threads", lambda current: 2)
    run = demo.Run(tmp_path, demo_config(["sepia"], 0), full=False, threads=threads, curves={"loss": [(5, 0.1)]})
    assert expected in run.warning


def test_the_threads_of_a_training_are_noted(monkeypatch, tmp_path):
    def train_student(config, adapter, teachers, data, report, start):
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)  # a number of its own
        report(demo.ENOUGH_UPDATES, {"loss": 0.0})
        torch.set_num_threads(before)

    monkeypatch.setattr(demo, "first_student", lambda *_: None)
    monkeypatch.setattr(demo, "train_student", train_student)
    for device, expected in (("cpu", torch.get_num_threads() + 1), ("cuda:0", None)):
        config = demo_config(["sepia"], 0).model_copy(update={"device": device})
        run = demo.Run(tmp_path, config, full=False)
        demo.train(run, None, {"sepia": None}, None)
        assert (run.threads, run.warning) == (expected, None)


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
