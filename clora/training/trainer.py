"""The distillation: student and critic trained against many teachers, all slots of one bank on one frozen base.

Source: docs/method.md section 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.config.settings import DistillConfig
from clora.data.batches import BatchSampler, DistillData
from clora.errors import about
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.training.checkpoint import check_same, load_state, resumable_settings, save_state
from clora.training.faults import StepCheck, raise_first
from clora.training.optimizers import make_average, make_optimizer
from clora.training.schedules import LearningRates
from clora.training.steps import CRITIC, STUDENT, TrainingSteps, teacher_ids

Report = Callable[[int, Mapping[str, float]], None]
"""``report(update, values)``, called after every student update."""


class DistillTrainer:
    """Trains the bank's student slot.

    Args:
        config: objective, sampler and training settings.
        adapter: the model family, around the pipeline whose transformer carries the bank.
        bank: ``critic``, whose slot follows the trained critic step by step, then one LoRA per effect.
        data: encoded training data.
        student, critic: what the two start from.
    """

    def __init__(
        self,
        config: DistillConfig,
        adapter: ModelAdapter,
        bank: AdapterBank,
        data: DistillData,
        student: LoRAState,
        critic: LoRAState,
    ):
        self.config = config
        self.bank = bank
        self.data = data
        self.student = bank.trained(STUDENT, student)
        self.critic = bank.trained(CRITIC, critic)
        bank.write(CRITIC, self.critic)
        self._trained = {STUDENT: self.student, CRITIC: self.critic}
        train = config.train
        bits, decay = train.optimizer_bits, train.weight_decay
        self.optimizers = {
            STUDENT: make_optimizer(train.optimizer, self.student.parameters(), train.learning_rate, bits, decay),
            CRITIC: make_optimizer("adamw", self.critic.parameters(), train.critic_learning_rate, bits, decay),
        }
        self.average = make_average(self.student.parameters(), train.ema_decay)
        self.rates = LearningRates(train, config.anchor_share)
        self.generator = torch.Generator().manual_seed(config.seed)
        device = adapter.pipeline.transformer.device
        self.sampler = BatchSampler(data, config.objective, train.batch_size, self.generator, device)
        self.steps = TrainingSteps(config, adapter, bank, data.effects, self._trained, self.optimizers, self.generator)
        self.anchor_share = config.anchor_share
        self.update = 0
        self.seconds = 0.0
        self.matching = False

    def fit(self, report: Report, checkpoint: Path | None = None) -> None:
        """Trains to ``train.updates`` student updates, or until ``train.minutes`` have passed.

        Args:
            report: called after every student update.
            checkpoint: resumed from if it exists, written every ``train.checkpoint_every`` updates and at the end.

        Raises:
            CloraError: a loss or gradient is not finite; names update, effect and term.
        """
        train = self.config.train
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
        start = time.monotonic() - self.seconds
        with recomputed_blocks(self.bank) if train.gradient_checkpointing else nullcontext():
            while (progress := self._progress()) < 1:
                self._set_learning_rates(progress)
                with about(f"update {self.update + 1}"):
                    values = raise_first(self._iterate(progress))
                if self.average is not None:
                    self.average.step(self.student.parameters())
                self.update += 1
                self.seconds = time.monotonic() - start
                report(self.update, values)
                if checkpoint is not None and self.update % train.checkpoint_every == 0:
                    self.save(checkpoint)
        if checkpoint is not None:
            self.save(checkpoint)  # what follows may fail, for example on a full disk

    def _progress(self) -> float:
        """The share of the run that is done, by updates or by time, whichever is more."""
        train = self.config.train
        passed = 0.0 if train.minutes is None else self.seconds / (60 * train.minutes)
        return max(self.update / train.updates, passed)

    def _iterate(self, progress: float) -> list[StepCheck]:
        """One student update and the critic updates that precede it; nothing is read from the device."""
        if self._is_anchoring(progress):
            return [self.steps.student_step(self.sampler.draw_targets(self.update))]
        if not self.matching and self.anchor_share > 0:
            self.steps.start_critic()
        self.matching = True
        objective = self.config.objective
        ratio = self.config.train.critic_ratio
        if not (objective.backward_simulation or objective.target_simulation):  # nothing for a critic to score
            return [self.steps.student_step(self.sampler.draw(self.update))]
        checks = []
        for i in range(ratio):
            batch = self.sampler.draw(self.update * ratio + i)
            if i == ratio - 1:  # the student's batch: its teachers arrive while the student samples
                self.bank.fetch(teacher_ids(batch.effect))
            rollout = self.steps.simulate(batch)
            checks.append(self.steps.critic_step(batch, rollout))
        # The student has not changed since the last rollout, so that its own step takes it: a simulation is saved.
        return [*checks, self.steps.student_step(batch, rollout)]

    def _is_anchoring(self, progress: float) -> bool:
        """Reports whether the run is in its first phase, which does not come back where a run is lengthened."""
        return progress < self.anchor_share and not self.matching

    def _set_learning_rates(self, progress: float) -> None:
        rates = self.rates.at(self.update, progress, self._is_anchoring(progress))
        for optimizer, rate in zip(self.optimizers.values(), rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate

    def exported(self) -> LoRAState:
        """Copies the LoRA that the collection gets: the student, or its moving average (``train.export``)."""
        if self.average is None or self.config.train.export == "student":
            return self.student.state(STUDENT)
        parameters = self.student.parameters()
        self.average.store(parameters)
        self.average.copy_to(parameters)
        state = self.student.state(STUDENT)
        self.average.restore(parameters)
        return state

    def save(self, path: Path) -> None:
        """Writes everything that a bit-exact resume needs."""
        tensors = self.sampler.state()
        for name, slots in self._trained.items():
            tensors |= {f"{name}.{i}": parameter for i, parameter in enumerate(slots.parameters())}
        if self.average is not None:
            tensors |= {f"ema.{i}": parameter for i, parameter in enumerate(self.average.shadow_params)}
        values = {
            "update": self.update,
            "seconds": self.seconds,
            "matching": self.matching,
            "config": resumable_settings(self.config),
            "teachers": self._teacher_norms,
        }
        save_state(path, tensors, self.optimizers, self.generator, values)

    def load(self, path: Path) -> None:
        """Restores a state written by `save`.

        Raises:
            CloraError: the file is broken, or comes from another configuration.
        """
        tensors, values = load_state(path, self.optimizers, self.generator)
        check_same(values["config"], resumable_settings(self.config), path)
        check_same(values["teachers"], self._teacher_norms, path)
        for name, slots in self._trained.items():
            for i, parameter in enumerate(slots.parameters()):
                parameter.data.copy_(tensors[f"{name}.{i}"])
        self.bank.write(CRITIC, self.critic)
        self.sampler.load_state(tensors)
        self.update = int(values["update"])
        if self.average is not None:
            for i, parameter in enumerate(self.average.shadow_params):
                parameter.copy_(tensors[f"ema.{i}"])
            self.average.optimization_step = self.update  # it takes one step an update
        self.seconds = float(values["seconds"])
        self.matching = bool(values["matching"])

    @cached_property
    def _teacher_norms(self) -> dict[str, str]:
        """Each teacher's norm, by which a resumed run notices that a file was replaced."""
        squares = self.bank.squared_norms()
        return {f"teacher {name}": f"{squares[name]:.6g}" for name in self.data.effects}
