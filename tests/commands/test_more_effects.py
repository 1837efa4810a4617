"""A run that goes on with more effects than it began with."""

from __future__ import annotations

import pytest
import torch
from helpers.pictures import write_images
from helpers.trainers import stop_at
from safetensors.torch import load_file

from clora.collection.metadata import LORA_FILE, read_collection
from clora.commands import distill as engine
from clora.commands.distill import distill
from clora.config.settings import DistillConfig
from clora.errors import CloraError
from clora.training.trainer import DistillTrainer


@pytest.fixture
def make(make_config):
    """A config of the first effects of: blueprint; snow, with pictures of its own."""

    def make(count, updates, pictures=None, **train):
        config = make_config(train={"updates": updates, "checkpoint_every": 1, "schedule": "constant", **train})
        tree = config.model_dump(mode="json")
        if pictures is not None:
            tree["effects"][1]["sources"] = str(pictures)
        return DistillConfig.model_validate({**tree, "effects": tree["effects"][:count]})

    return make


def learned(monkeypatch):
    """The updates in which each effect is drawn."""
    seen = {}
    real = DistillTrainer._iterate

    def noting(trainer, progress):
        draw = trainer.sampler.gather

        def gather(general):
            batch = draw(general)
            for effect in batch.effect.tolist():
                seen.setdefault(effect, set()).add(trainer.update)
            return batch

        trainer.sampler.gather = gather
        try:
            return real(trainer, progress)
        finally:
            del trainer.sampler.gather

    monkeypatch.setattr(DistillTrainer, "_iterate", noting)
    return seen


@pytest.mark.parametrize("own_pictures", [False, True])
def test_a_finished_run_learns_one_more_effect(make, tmp_path, monkeypatch, capsys, own_pictures):
    pictures = write_images(tmp_path / "own", 3) if own_pictures else None
    first = load_file(distill(make(1, 2)) / LORA_FILE)
    seen = learned(monkeypatch)
    folder = distill(make(2, 6, pictures))
    said = capsys.readouterr().err
    assert "going on at update 2, where the finished run" in said
    assert "new from update 2 on: snow, without a phase of anchoring" in said
    assert [effect.name for effect in read_collection(folder).effects] == ["blueprint", "snow"]
    assert seen[0] | seen[1] <= {2, 3, 4, 5}
    assert seen[1]
    second = load_file(folder / LORA_FILE)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert distill(make(2, 6, pictures)) == folder
    assert "nothing is trained" in capsys.readouterr().err


def test_a_stopped_run_goes_on_with_one_more_effect(make, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(make(1, 3))
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(make(2, 3))
    assert "resuming at update 1" in capsys.readouterr().err
    distill(make(2, 3))
    assert "resuming at update 2" in capsys.readouterr().err


def test_an_effect_is_not_added_to_a_run_that_has_ended(make, capsys):
    """Neither unlearned, nor by training all the others again without being asked."""
    folder = distill(make(1, 2))
    before = (folder / LORA_FILE).read_bytes()
    finished = folder / engine.FINISHED
    with pytest.raises(CloraError, match=r"set train.updates above 2.*, or remove .*finished.safetensors to train all"):
        distill(make(2, 2))
    assert (folder / LORA_FILE).read_bytes() == before
    finished.unlink()
    assert len(read_collection(distill(make(2, 2))).effects) == 2


def test_effects_are_only_added_after_the_others_and_with_updates_to_learn_them(make, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(make(2, 3))
    monkeypatch.setattr(engine, "encode_data", None)
    both = make(2, 3)
    for effects in (both.effects[::-1], both.effects[:1], both.effects[1:]):
        with pytest.raises(CloraError, match=r"another run \(other effects\).*effects may be added after the others"):
            distill(both.model_copy(update={"effects": effects}))
    third = both.effects[1].model_copy(update={"name": "third"})
    with pytest.raises(CloraError, match=r"third would be added to a run that has ended; set train.updates above 2"):
        distill(make(2, 2).model_copy(update={"effects": (*both.effects, third)}))
