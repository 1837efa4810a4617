"""The end of a run: what a stopped one has left is completed, and a finished one goes on."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.trainers import stop_at
from helpers.written import TIMED, files_of
from safetensors.torch import load_file

from clora.collection.write import LORA_FILE
from clora.commands import distill as engine
from clora.commands.distill import distill
from clora.data import rendering as targets_module
from clora.training import resume
from clora.training.resume import Checkpoints
from clora.training.trainer import DistillTrainer


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_finished_run_goes_on_with_more_updates(make_config, capsys):
    def run(**train):
        return distill(make_config(train={"checkpoint_every": 1, "schedule": "constant", **train}))

    run(updates=1)
    lengthened = load_file(run(updates=3) / LORA_FILE)
    assert "going on at update 1, where the finished run" in capsys.readouterr().err
    run(updates=2)
    assert "going on" not in capsys.readouterr().err, "a shorter run is another one"
    shutil.rmtree(make_config().output)
    whole = load_file(run(updates=3) / LORA_FILE)
    assert all(torch.equal(lengthened[key], whole[key]) for key in whole)


def stopped_before_samples(patch):
    patch.setattr(engine, "draw_samples", interrupt)


def stopped_in_the_caches(patch):
    patch.setattr(engine, "shutil", SimpleNamespace(rmtree=lambda folder, **settings: interrupt()))


def stopped_before_the_checkpoints(patch):
    patch.setattr(Checkpoints, "finish", interrupt)


def stopped_at_the_last_rename(patch):
    patch.setattr(resume.Path, "replace", interrupt)


def stopped_at_the_last_removal(patch):
    rmdir = resume.Path.rmdir
    patch.setattr(
        resume.Path, "rmdir", lambda path: interrupt() if path.match("*/checkpoints") and path.exists() else rmdir(path)
    )


ENDS = (
    stopped_before_samples,
    stopped_in_the_caches,
    stopped_before_the_checkpoints,
    stopped_at_the_last_rename,
    stopped_at_the_last_removal,
)


@pytest.mark.parametrize("stop", ENDS)
def test_the_next_run_completes_what_is_left_to_do(make_config, monkeypatch, tmp_path, stop):
    config = make_config(train={"updates": 2, "checkpoint_every": 1})
    distill(config.model_copy(update={"output": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        stop(patch)
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    monkeypatch.setattr(DistillTrainer, "_iterate", None)  # nothing is trained
    monkeypatch.setattr(targets_module, "render_targets", None)
    distill(config)

    def found(folder):
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file() and file.name not in TIMED
        }

    whole, completed = found(tmp_path / "whole"), found(tmp_path / "out")
    checkpoint = engine.FINISHED  # states how long the training took
    assert completed.pop(checkpoint)
    assert whole.pop(checkpoint)
    assert completed == whole
    assert [path.name for path in (tmp_path / "out" / engine.CACHE).iterdir()] == ["finished.safetensors"]


def test_a_finished_collection_leaves_another_run_s_checkpoints_in_place(finished, monkeypatch, tmp_path, capsys):
    config, trained = finished
    longer = config.train.model_copy(update={"updates": 4, "checkpoint_every": 1, "weight_decay": 0.5})
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(config.model_copy(update={"train": longer}))
    before = files_of(tmp_path / "out")
    distill(config)
    assert "nothing is trained" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before
    assert len(trained) == 1


def damaged_end(config, file):
    file.write_bytes(file.read_bytes()[:-8])
    return config


def other_seed(config, file):
    return config.model_copy(update={"seed": 5})


def fewer_updates(config, file):
    return config.model_copy(update={"train": config.train.model_copy(update={"updates": 1})})


ANEW = {
    damaged_end: "is damaged",
    other_seed: "another run (seed was 0",
    fewer_updates: "more than train.updates: 1",
}


@pytest.mark.parametrize("change", ANEW)
def test_why_a_finished_run_is_not_continued_is_said(make_config, tmp_path, capsys, change):
    config = make_config()
    distill(config)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"updates": 3})})
    capsys.readouterr()
    distill(change(longer, tmp_path / "out" / engine.FINISHED))
    said = capsys.readouterr().err
    assert "training begins anew, and not where the finished run has ended: checkpoint" in said
    assert ANEW[change] in said
    assert "from the beginning" not in said, "it begins there without being asked"
    assert "to start" not in said
    assert "to go on" not in said
