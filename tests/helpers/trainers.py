"""Trainers of random teachers, and which of their LoRAs an update changed."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from clora.bank.bank import AdapterBank
from clora.testing import random_data, random_lora, random_teachers, tiny_config
from clora.training.steps import CRITIC, STUDENT
from clora.training.trainer import DistillTrainer


@contextmanager
def make_trainer(adapter, encoded=None, pages=None, **sections):
    """A trainer of three random teachers. Student and critic differ, and neither is zero at the start."""
    transformer = adapter.pipeline.transformer
    teachers = random_teachers(transformer, 3)
    student, critic = random_lora(transformer, 4, 101), random_lora(transformer, 4, 102)
    config = tiny_config(list(teachers), **sections)
    with AdapterBank(transformer, {CRITIC: critic, **teachers}, pages=pages, fixed=1) as bank:
        yield DistillTrainer(config, adapter, bank, encoded or random_data(adapter, list(teachers)), student, critic)


def mixed_batch(trainer):
    """A batch of several effects' rows and of general rows; every objective draws the same one."""
    general = torch.arange(trainer.config.train.batch_size) % 3 == 1
    batch = trainer.sampler.gather(general)
    assert len(batch.effect.unique()) > 2, "draw another seed"
    return batch


def rolled(trainer):
    """A mixed batch and the student's rollout on it."""
    batch = mixed_batch(trainer)
    return batch, trainer.steps.simulate(batch)


def plain_velocity(adapter, transformer, x, sigma, conditioning):
    """The adapter's velocity by another transformer, one whose weights hold a merged LoRA for instance."""
    stand_in = copy.copy(adapter)
    stand_in.pipeline = SimpleNamespace(transformer=transformer)
    with torch.no_grad():
        return stand_in.velocity(x, sigma, conditioning)


def same(state, other):
    """Reports whether two LoRAs of the same layers have equal factors."""
    return all(
        torch.equal(state.modules[m].lora_A, other.modules[m].lora_A)
        and torch.equal(state.modules[m].lora_B, other.modules[m].lora_B)
        for m in state.modules
    )


def changed(trainer, before):
    """Names of the slots that differ from `slots` of an earlier moment."""
    return {name for name, state in slots(trainer).items() if not same(before[name], state)}


def slots(trainer):
    """Copies of student and critic as they are trained, and the teachers, by name."""
    teachers = {name: trainer.bank.state(name) for name in trainer.data.effects}
    return {STUDENT: trainer.student.state(STUDENT), CRITIC: trainer.critic.state(CRITIC), **teachers}


def stop_at(update, monkeypatch):
    """Lets a run be interrupted as it begins an update."""
    iterate = DistillTrainer._iterate

    def stopping(trainer, progress):
        if trainer.update == update:
            raise KeyboardInterrupt
        return iterate(trainer, progress)

    monkeypatch.setattr(DistillTrainer, "_iterate", stopping)
