"""Previews: fixed pictures and noise, kept as files, drawn when they are due, and without influence on the training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.trainers import make_trainer
from PIL import Image

from clora.data.batches import Previews as PreviewData
from clora.report.previews import picture_file, read_previews
from clora.training import previews as module
from clora.training.previews import Previews
from clora.training.steps import STUDENT


@pytest.fixture
def drawn(adapter, tmp_path):
    """Returns drawn(trainer, update=0): previews of a trainer's effects, in a folder."""

    def make(trainer, update=0):
        generator = torch.Generator().manual_seed(5)
        size = len(trainer.data.effects), *adapter.latent_shape
        shown = PreviewData(
            [torch.rand(3, *adapter.size, generator=generator) * 2 - 1 for _ in trainer.data.effects],
            trainer.data.sources[:, 0],
            torch.randn(size, generator=generator),
            trainer.data.student_text[:, 0, 0],
        )
        data = dataclasses.replace(trainer.data, previews=shown)
        return Previews(trainer.config, adapter, data, tmp_path / "previews", torch.device("cpu"), update)

    return make


def trained(adapter, previews=None, **train):
    with make_trainer(adapter, train={"updates": 4, **train}) as trainer:
        trainer.fit(lambda *_: None, previews=None if previews is None else previews(trainer))
        return trainer.student.state(STUDENT)


def test_a_training_is_the_same_with_previews(adapter, drawn):
    plain = trained(adapter)
    watched = trained(adapter, drawn, preview_every=1)
    for name, module_ in plain.modules.items():
        assert torch.equal(module_.lora_B, watched.modules[name].lora_B)


def test_every_effect_is_drawn_before_the_first_update_and_after_those_that_are_due(adapter, drawn, tmp_path):
    trained(adapter, drawn, preview_every=3)
    folder = tmp_path / "previews"
    kept = read_previews(folder)
    assert [preview.update for preview in kept] == [0, 3, 4], "the last one too"
    names = list(kept[0].psnr)
    for number, name in enumerate(names):
        files = [folder / picture_file(number, name, of) for of in ("source", "target", 0, 3, 4)]
        pictures = [np.asarray(Image.open(file)).astype(float) for file in files]
        assert np.abs(pictures[2] - pictures[4]).mean() > 0.5, "the student has learned"
    assert kept[0].psnr != kept[-1].psnr


def test_the_moving_average_is_drawn_where_that_is_exported(adapter, drawn, monkeypatch):
    seen = []
    monkeypatch.setattr(Previews, "draw", lambda self, bank, student, update: seen.append(student.state(STUDENT)))
    with make_trainer(adapter, train={"updates": 3, "ema_decay": 0.5, "preview_every": 1}) as trainer:
        trainer.fit(lambda *_: None, previews=drawn(trainer))
        exported, student = trainer.exported(), trainer.student.state(STUDENT)
    name = next(iter(exported.modules))
    assert torch.equal(seen[-1].modules[name].lora_B, exported.modules[name].lora_B)
    assert not torch.equal(seen[-1].modules[name].lora_B, student.modules[name].lora_B)


def test_by_default_they_take_two_percent_of_the_time(adapter, drawn, monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with make_trainer(adapter, train={"preview_every": "auto"}) as trainer:
        previews = drawn(trainer)
        assert previews.is_due(0)
        decode = previews._decode

        def slow(latents):
            nonlocal now
            now += 3.0
            return decode(latents)

        previews._decode = slow
        previews.draw(trainer.bank, trainer.student, 0)
        now += 149.0
        assert not previews.is_due(7)
        now += 1.0
        assert previews.is_due(8)


def test_a_run_that_goes_on_keeps_what_was_drawn_before(adapter, drawn, tmp_path):
    trained(adapter, drawn, preview_every=1)
    with make_trainer(adapter, train={"preview_every": 1}) as trainer:
        previews = drawn(trainer, update=2)
        previews.draw(trainer.bank, trainer.student, 3)
        assert [preview.update for preview in read_previews(tmp_path / "previews")] == [0, 1, 2, 3]
        drawn(trainer)
    assert not read_previews(tmp_path / "previews"), "a run that begins anew keeps none"
