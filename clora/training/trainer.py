"""The distillation: student and critic trained against many teachers, all slots of one bank on one frozen base.

Source: docs/method.md section 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.compiled import compiled_blocks
from clora.bank.graphs import graphed_blocks
from clora.bank.recompute import recomputed_blocks
from clora.config.settings import DistillConfig
from clora.data.batches import BatchSampler, DistillData
from clora.errors import CloraError, about
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning
from clora.models.loading import run_dtype
from clora.progress import say
from clora.stopping import StopRequest
from clora.threads import choose_threads
from clora.training.checkpoint import DamagedCheckpoint, load_state, save_state
from clora.training.divergence import CALM_CHANGE, CALM_RISE, SOON, LossLevels
from clora.training.faults import StepCheck, raise_explosion, raise_first
from clora.training.optimizers import make_average, make_optimizer
from clora.training.previews import Previews
from clora.training.resume import Checkpoints, check_resumable, check_same, resumable_settings
from clora.training.schedules import LearningRates
from clora.training.steps import CRITIC, STUDENT, TrainingSteps, teacher_ids

Report = Callable[[int, Mapping[str, float]], None]
"""``report(update, values)``, called after every student update with the terms of the losses (`LOSSES`), gradients and rates."""


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
        self.levels = LossLevels(config.objective.weights)
        self.update = 0
        self.seconds = 0.0
        self.matching = False
        self.threads: int | None = None

    def fit(
        self,
        report: Report,
        checkpoints: Checkpoints | None = None,
        stop: StopRequest | None = None,
        previews: Previews | None = None,
    ) -> None:
        """Trains to ``train.updates`` student updates, or until ``train.minutes`` have passed.

        Args:
            report: called after every student update.
            checkpoints: the newest is resumed from, one is written every ``train.checkpoint_every`` updates and at the
                end.
            previews: drawn of the student as it would be exported, before the first update too.
            stop: looked at after every update, the last one too; a checkpoint is written before the run stops.

        Raises:
            CloraError: a loss or gradient is not finite, or a loss or the weights explode; names update, effect and term,
                and the checkpoint from before, which is kept.
            KeyboardInterrupt, Stopped: as `StopRequest.stop`.
        """
        train = self.config.train
        if checkpoints is not None:
            checkpoints.resume(self.config, lambda file: self.load(file, checkpoints.inputs))
        start = time.monotonic() - self.seconds
        stop = stop or StopRequest()
        with ExitStack() as ways:
            ways.enter_context(self._chosen_threads())
            if train.gradient_rows == "auto":
                self._choose_rows()
            ways.enter_context(stop.gently())
            if train.compile:
                ways.enter_context(compiled_blocks(self.bank))
            if train.cuda_graphs:
                ways.enter_context(graphed_blocks(self.bank))
            if train.gradient_checkpointing:
                ways.enter_context(recomputed_blocks(self.bank))
            self._preview(previews)
            while (progress := self._progress()) < 1:
                self._set_learning_rates(progress)
                with about(f"update {self.update + 1}"):
                    values = self._checked(self._iterate(progress), checkpoints)
                if self.average is not None:
                    self.average.step(self.student.parameters())
                self.update += 1
                self.seconds = time.monotonic() - start
                report(self.update, values | self._rates())
                self._preview(previews)
                if self.update % train.checkpoint_every == 0:
                    self._keep(checkpoints)
                if stop.is_requested:
                    break
            self._keep(checkpoints)  # what follows may fail, for example on a full disk

    def _checked(self, checks: Sequence[StepCheck], checkpoints: Checkpoints | None) -> dict[str, float]:
        """Reads an update's steps, before anything is made or kept of them; a run that has diverged goes back."""
        try:
            values = raise_first(checks)
            self.levels.add(values)
            raise_explosion(checks, self.levels)
        except CloraError as error:
            if checkpoints is None:
                raise
            raise CloraError(f"{error}. {checkpoints.go_back()}") from error
        return values

    @contextmanager
    def _chosen_threads(self) -> Iterator[None]:
        """Inside, a training on a CPU has the threads that were chosen at its beginning: its last digits depend on them."""
        if self.sampler.device.type != "cpu":
            yield
            return
        current = torch.get_num_threads()
        self.threads, line = choose_threads(current, self.threads)
        if line:
            say(line)
        if self.threads == current:
            yield
            return
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(current)  # the user's process goes on

    def _choose_rows(self) -> None:
        """Chooses the rows of a pass with gradients once, at the run's beginning: its last digits depend on them."""
        if self.steps.gradient_rows is not None:
            say(f"a pass that learns takes {self.steps.gradient_rows} rows, as before (train.gradient_rows: auto)")
            return
        data = self.data
        row = Conditioning(data.text[data.student_text[0, 0, :1]], data.sources[0, :1])
        with recomputed_blocks(self.bank) if self.config.train.gradient_checkpointing else nullcontext():
            self.steps.choose_rows(row)
        say(f"a pass that learns takes {self.steps.gradient_rows} rows (train.gradient_rows: auto)")

    def _is_calm(self) -> bool:
        """Reports a state that may be gone back to: nothing is near to where a run is stopped."""
        changes = [float(self.steps.change(slots)) for slots in self._trained.values()]
        rises = self.levels.rises(SOON).values()
        return max(changes) <= CALM_CHANGE and max(rises, default=0.0) <= CALM_RISE

    def _keep(self, checkpoints: Checkpoints | None) -> None:
        """Writes a checkpoint, unless the run has that of this update."""
        if checkpoints is not None and not checkpoints.has(self.update):
            self.save(checkpoints.path(self.update), checkpoints.inputs)
            checkpoints.wrote(self.update)

    def _progress(self) -> float:
        """The share of the run that is done."""
        return self.config.train.progress(self.update, self.seconds)

    def _iterate(self, progress: float) -> list[StepCheck]:
        """One student update and the critic updates that precede it; nothing is read from the device."""
        if self._is_anchoring(progress):
            return [self.steps.student_step(self.sampler.draw_targets(self.update))]
        if not self.matching and self.anchor_share > 0:
            self.steps.start_critic()
        self.matching = True
        ratio = self.config.train.critic_ratio
        if not self._has_critic:
            return [self.steps.student_step(self.sampler.draw(self.update))]
        checks = []
        for i in range(ratio - 1):
            batch = self.sampler.draw(self.update * ratio + i)
            checks.append(self.steps.critic_step(batch, self.steps.simulate(batch)))
        # The student's batch: its teachers arrive while the student samples.
        batch = self.sampler.draw(self.update * ratio + ratio - 1)
        self.bank.fetch(teacher_ids(batch.effect))
        rollout = self.steps.simulate(batch)
        # The student does not change before its own step, which takes the last critic's rollout and what it predicted
        # there: a simulation and a pass are saved.
        predicted = self.steps.predict(batch, rollout)
        checks.append(self.steps.critic_step(batch, rollout, predicted))
        return [*checks, self.steps.student_step(batch, rollout, predicted)]

    def _is_anchoring(self, progress: float) -> bool:
        """Reports whether the run is in its first phase, which does not come back where a run is lengthened."""
        return progress < self.anchor_share and not self.matching

    def _set_learning_rates(self, progress: float) -> None:
        rates = self.rates.at(self.update, progress, self._is_anchoring(progress))
        for optimizer, rate in zip(self.optimizers.values(), rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate

    def _rates(self) -> dict[str, float]:
        """The learning rates of the update that was made; the critic's where it learns."""
        names = (STUDENT, CRITIC) if self.matching and self._has_critic else (STUDENT,)
        return {f"{name}_rate": self.optimizers[name].param_groups[0]["lr"] for name in names}

    def _preview(self, previews: Previews | None) -> None:
        if previews is not None and (previews.is_due(self.update) or self._progress() >= 1):
            with self._as_exported():
                previews.draw(self.bank, self.student, self.update)

    def exported(self) -> LoRAState:
        """Copies the LoRA that the collection gets: the student, or its moving average (``train.export``)."""
        with self._as_exported():
            return self.student.state(STUDENT)

    @contextmanager
    def _as_exported(self) -> Iterator[None]:
        """Inside, the student has the weights that the collection gets."""
        if self.average is None or self.config.train.export == "student":
            yield
            return
        parameters = self.student.parameters()
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def save(self, path: Path, inputs: Mapping[str, str] | None = None) -> None:
        """Writes everything that a bit-exact resume needs, and the hashes of what was trained on (`Checkpoints`)."""
        values = {
            "update": self.update,
            "seconds": self.seconds,
            "matching": self.matching,
            "calm": self._is_calm(),
            "levels": self.levels.state(),
            "gradient_rows": self.steps.gradient_rows,
            "threads": self.threads,
            "dtype": run_dtype(self.config),
            "config": resumable_settings(self.config),
            "inputs": dict(inputs or {}),
        }
        save_state(path, self._tensors(), self.optimizers, self.generator, values)

    def load(self, path: Path, inputs: Mapping[str, str] | None = None) -> None:
        """Restores a state written by `save`.

        Raises:
            CloraError: the file is damaged, or comes from another configuration or other inputs.
        """
        tensors, values = load_state(path, self.optimizers, self.generator)
        check_resumable(path, values, self.config, inputs or {})
        if "teachers" in values:  # of an earlier version
            check_same(values["teachers"], self._teacher_norms, path)
        self.update = values["update"]
        self.seconds = float(values["seconds"])
        self.matching = values["matching"]
        self.levels.load_state(values.get("levels", {}))
        if self.config.train.gradient_rows == "auto":
            # Stated or chosen; of a run without a bound there is none, and it is chosen now.
            self.steps.gradient_rows = values.get("gradient_rows")
        self.threads = values.get("threads")  # none of an earlier version, or on a GPU
        self._check_complete(path, tensors)
        with torch.no_grad():
            for name, own in self._tensors().items():
                own.copy_(tensors[name])
        self.sampler.load_state(tensors)
        self.bank.write(CRITIC, self.critic)
        if self.average is not None:
            self.average.optimization_step = self.update  # it takes one step an update

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, but for the optimizers and the generator."""
        tensors = self.sampler.state()
        for name, slots in self._trained.items():
            tensors |= {f"{name}.{i}": parameter for i, parameter in enumerate(slots.parameters())}
        if self.average is not None:
            tensors |= {f"ema.{i}": parameter for i, parameter in enumerate(self.average.shadow_params)}
        return tensors

    def _check_complete(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Refuses a checkpoint that lacks a tensor, or the state of an optimizer that has made steps."""
        for name, own in self._tensors().items():
            found = tensors.get(name)
            if found is None or found.shape != own.shape or found.dtype != own.dtype:
                what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise DamagedCheckpoint(path, f"expected {name} as {own.dtype} {list(own.shape)}, found {what}")
        stepped = {STUDENT: self.update > 0, CRITIC: self.matching and self._has_critic}
        for name, optimizer in self.optimizers.items():
            if stepped[name] and not optimizer.state:
                raise DamagedCheckpoint(path, f"it lacks the state of the optimizer of {name}")

    @property
    def _has_critic(self) -> bool:
        """Reports whether there is anything for a critic to score."""
        return self.config.objective.backward_simulation or self.config.objective.target_simulation

    @cached_property
    def _teacher_norms(self) -> dict[str, str]:
        """Each teacher's norm, by which earlier versions noticed that a file was replaced."""
        squares = self.bank.squared_norms()
        return {f"teacher {name}": f"{squares[name]:.6g}" for name in self.data.effects}
