"""The distillation: student and critic trained against many teachers, all slots of one bank on one frozen base.

Source: docs/method.md section 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.bank.slots import Slots
from clora.config.settings import DistillConfig
from clora.data.batches import Batch, BatchSampler, DistillData
from clora.devices import send
from clora.flow.matching import add_noise, sample_sigma, student_schedule, velocity_to_x0
from clora.flow.objective import (
    TAU_BOUNDS,
    critic_loss,
    draw_anchor_sigma,
    draw_backward_steps,
    draw_critic_sigma,
    draw_target_steps,
)
from clora.flow.sampling import guided, simulate_to_step
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning
from clora.ops import ANCHOR, BACKWARD_SIMULATION, TARGET_SIMULATION, Scores, coarse_to_fine_loss
from clora.training.checkpoint import check_same, load_state, resumable_settings, save_state
from clora.training.faults import StepCheck, raise_first
from clora.training.optimizers import make_optimizer
from clora.training.rows import Part, StudentRows, kinds, slices

STUDENT, CRITIC = "student", "critic"
Report = Callable[[int, Mapping[str, float]], None]
"""``report(update, values)``, called after every student update."""


class Rollout(NamedTuple):
    """The student's own trajectories, each up to a random step.

    Attributes:
        x: ``[B, T, C]`` noisy latents in the adapter's ``latent_dtype``.
        sigma: ``[B]`` their noise levels, on the CPU.
    """

    x: Tensor
    sigma: Tensor


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
        self.adapter = adapter
        self.bank = bank
        self.data = data
        self.student = bank.trained(STUDENT, student)
        self.critic = bank.trained(CRITIC, critic)
        self.scorers = bank.slots()
        bank.write(CRITIC, self.critic)
        self._trained = {STUDENT: self.student, CRITIC: self.critic}
        train = config.train
        bits = train.optimizer_bits
        self.student_optimizer = make_optimizer(train.optimizer, self.student.parameters(), train.learning_rate, bits)
        self.critic_optimizer = make_optimizer("adamw", self.critic.parameters(), train.critic_learning_rate, bits)
        self._optimizers = {STUDENT: self.student_optimizer, CRITIC: self.critic_optimizer}
        self.generator = torch.Generator().manual_seed(config.seed)
        self.dtype = adapter.latent_dtype
        device = adapter.pipeline.transformer.device
        self.sampler = BatchSampler(data, config.objective, train.batch_size, self.generator, device)
        self.sigmas = student_schedule(config.sampler.steps, config.sampler.shift)
        self.tau = TAU_BOUNDS[config.objective.tau_rule]
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
                self._set_learning_rate(progress)
                values = raise_first(self._iterate(progress))
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
        if progress < self.anchor_share:
            return [self.student_step(self.sampler.draw_targets(self.update))]
        if not self.matching and self.anchor_share > 0:
            self._start_critic()
        self.matching = True
        objective = self.config.objective
        ratio = self.config.train.critic_ratio
        if not (objective.backward_simulation or objective.target_simulation):  # nothing for a critic to score
            return [self.student_step(self.sampler.draw(self.update))]
        checks = []
        for i in range(ratio):
            batch = self.sampler.draw(self.update * ratio + i)
            if i == ratio - 1:  # the student's batch: its teachers arrive while the student samples
                self.bank.fetch(_teacher_ids(batch.effect))
            rollout = self.simulate(batch)
            checks.append(self.critic_step(batch, rollout))
        # The student has not changed since the last rollout, so that its own step takes it: a simulation is saved.
        return [*checks, self.student_step(batch, rollout)]

    @torch.no_grad()
    def _start_critic(self) -> None:
        """Sets the critic to the student, whose samples it must model; anchoring trains only the student."""
        for critic, student in zip(self.critic.parameters(), self.student.parameters(), strict=True):
            critic.copy_(student)
        self.bank.write(CRITIC, self.critic)

    def student_step(self, batch: Batch, rollout: Rollout | None = None) -> StepCheck:
        """One update of the student by the coarse-to-fine objective (method.md section 4c).

        Args:
            batch: the samples.
            rollout: from `simulate` of this batch; None for trajectory anchoring only.
        """
        rows = self._student_rows(batch, rollout)
        # One part after the other, so that only its activations are in memory; the gradients add up.
        parts = [self._learn(part) for part in rows.split(self.config.train.gradient_rows)]
        norm = self._step(self.student_optimizer, self.student)
        values = {}
        for name in ("dmd_bs", "dmd_ts", "anchor", "loss"):
            values[name] = sum(terms[name] for terms in parts)
        return StepCheck(
            f"update {self.update + 1}: the student",
            values,
            nonfinite=torch.cat([terms["nonfinite"] for terms in parts]),
            gradient_norm=norm,
            strength=torch.cat([terms["gradient_norm"] for terms in parts]),
            strongest="strongest",
            source=partial(self._source, rows.effect, rows.kind),
        )

    def _learn(self, rows: StudentRows) -> dict[str, Tensor]:
        """Adds the gradient of some of an update's rows; returns the terms of their loss."""
        velocity = self._velocity(self.student, 0, rows.x, rows.sigma, rows.conditioning)
        loss, terms = coarse_to_fine_loss(
            velocity,
            rows.x,
            send(rows.sigma, velocity.device),
            send(rows.kind, velocity.device),
            send(rows.weight, velocity.device),
            self._score(rows, velocity.detach()) if len(rows.teacher) else None,
            rows.anchor_target,
            self.config.sampler.guidance,
        )
        # The loss comes with its gradient on the velocity, from where autograd goes on into the student's factors.
        velocity.backward(terms.pop("velocity_gradient"))
        return terms | {"loss": loss.detach()}

    def critic_step(self, batch: Batch, rollout: Rollout) -> StepCheck:
        """One update of the critic by flow matching on fresh student samples (method.md section 4d)."""
        x, sigma = rollout
        with torch.no_grad():
            x0 = velocity_to_x0(x.float(), self._velocity(self.student, 0, x, sigma, batch.student), sigma)
        noise = self._noise(x0)
        sigma = sample_sigma(len(x0), self.config.sampler.shift, self.generator)
        x = add_noise(x0, noise, sigma)
        parts = []
        for c in slices(len(x0), self.config.train.gradient_rows):
            velocity = self._velocity(self.critic, 0, x[c], sigma[c], batch.student[c])
            loss, losses = critic_loss(velocity, noise[c], x0[c])
            # The loss is a mean over rows: a part counts with its share of them, so that the gradients add up.
            (loss * (len(losses) / len(x0))).backward()
            parts.append(losses)
        norm = self._step(self.critic_optimizer, self.critic)
        self.bank.write(CRITIC, self.critic)
        losses = torch.cat(parts)
        return StepCheck(
            f"update {self.update + 1}: the critic",
            {"critic": losses.mean()},
            nonfinite=~torch.isfinite(losses),
            gradient_norm=norm,
            strength=losses,
            strongest="largest loss",
            source=partial(self._source, batch.effect, None),
        )

    def _student_rows(self, batch: Batch, rollout: Rollout | None) -> StudentRows:
        """The rows of one student forward: backward simulation, target simulation, trajectory anchoring."""
        objective = self.config.objective
        shift = self.config.sampler.shift
        simulated = objective.backward_simulation and rollout is not None
        parts = []
        # Distribution matching at two kinds of inputs: the student's own noisy samples, and noised targets at a step
        # of its schedule below tau_max. General rows have no target of a teacher to start from.
        if simulated:
            parts.append(Part(BACKWARD_SIMULATION, batch, *rollout, objective.weights.backward_simulation))
        effects = batch[batch.effect >= 0]
        if objective.target_simulation and rollout is not None and len(effects):
            steps = draw_target_steps(len(effects), self.sigmas, self.tau.tau_max, self.generator)
            x = add_noise(effects.target, self._noise(effects.target), self.sigmas[steps])
            x = x.to(self.dtype)
            parts.append(Part(TARGET_SIMULATION, effects, x, self.sigmas[steps], objective.weights.target_simulation))
        # These D rows are scored: their predictions are noised again to a level of their own.
        kind = kinds(parts)
        score_sigma = draw_critic_sigma(kind, shift, self.tau.tau_min, self.generator)
        # Flow matching on targets: the velocity to learn is noise minus target, whatever the noise level.
        anchor_target = batch.target[:0]
        anchored = batch[batch.has_target]
        if objective.trajectory_anchoring and len(anchored):
            # The released code's lower bound is the critic's level of the sample's backward simulation, whose rows, the
            # whole batch, come first among the scored ones.
            released = simulated and objective.anchor_noise == "released"
            floor = score_sigma[: len(batch)][batch.has_target] if released else None
            sigma = draw_anchor_sigma(len(anchored), shift, self.generator, floor)
            noise = self._noise(anchored.target)
            anchor_target = noise - anchored.target
            x = add_noise(anchored.target, noise, sigma).to(self.dtype)
            parts.append(Part(ANCHOR, anchored, x, sigma, objective.weights.trajectory_anchoring))
        score_noise = self._noise(batch.target.new_empty(len(kind), *batch.target.shape[1:]))
        return StudentRows.join(parts, score_sigma, score_noise, anchor_target)

    @torch.no_grad()
    def simulate(self, batch: Batch) -> Rollout:
        """Backward simulation: noisy latents on the student's own trajectories, each at a random step."""
        steps = draw_backward_steps(len(batch), len(self.sigmas), self.generator)

        def velocity(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            return self._velocity(self.student, 0, x, sigma, batch.student[rows])

        noise = self._noise(batch.target).to(self.dtype)
        x = simulate_to_step(velocity, noise, self.sigmas, steps, self.generator)
        return Rollout(x, self.sigmas[steps])

    @torch.no_grad()
    def _score(self, rows: StudentRows, velocity: Tensor) -> Scores:
        """Critic and teacher velocities of the re-noised predictions, in one routed pass (method.md section 4c).

        Args:
            rows: D of them are scored.
            velocity: ``[R, T, C]`` the student's, without gradient.
        """
        sampler = self.config.sampler
        n = len(rows.teacher)
        x0 = velocity_to_x0(rows.x[:n].float(), velocity[:n], rows.sigma[:n])
        renoised = add_noise(x0, rows.score_noise, rows.score_sigma).to(self.dtype)
        # Two or three rows per sample in one batch: the critic under the student's prompt, the teacher under its own,
        # and with guidance the teacher under the empty prompt. The bank's LoRA 0 is the critic.
        repeats = sampler.rows_per_scored_sample
        teacher_ids = _teacher_ids(rows.effect[:n])
        ids = [torch.zeros(n, dtype=torch.int64), teacher_ids, teacher_ids][:repeats]
        parts = [rows.conditioning[slice(n)], rows.teacher, rows.uncond][:repeats]
        scores = self._routed(
            torch.cat(ids),
            renoised.repeat(repeats, 1, 1),
            rows.score_sigma.repeat(repeats),
            Conditioning.cat(parts),
        )
        critic, teacher, *rest = scores.chunk(repeats)
        uncond = rest[0] if rest else teacher
        if self.config.objective.norm_rescale:
            # Guided here: with both velocities equal, the guidance that the loss applies changes nothing more.
            teacher = uncond = guided(teacher.float(), uncond.float(), sampler.guidance, norm_rescale=True)
        return Scores(renoised, send(rows.score_sigma, x0.device), critic, teacher, uncond)

    def _routed(self, ids: Tensor, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """A pass over the bank's LoRAs, in parts of ``train.forward_rows`` and of as many teachers as fit at once."""
        velocities = []
        for c in self.bank.chunks(ids, self.config.train.forward_rows or len(ids)):
            with self.bank.placed(ids[c]) as slots:
                velocities.append(self._velocity(self.scorers, slots, x[c], sigma[c], conditioning[c]))
        return torch.cat(velocities)

    def _velocity(
        self, slots: Slots, ids: Tensor | int, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        adapter_ids = torch.full((len(x),), ids) if isinstance(ids, int) else ids
        with self.bank.route(slots, send(adapter_ids, x.device)):
            return self.adapter.velocity(x, send(sigma, x.device), conditioning)

    def _noise(self, like: Tensor) -> Tensor:
        return send(torch.randn(like.shape, generator=self.generator), like.device, like.dtype)

    def _step(self, optimizer: torch.optim.Optimizer, slots: Slots) -> Tensor:
        """Clips the gradients, makes a step and drops them; returns their norm ``[]`` before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(slots.parameters(), self.config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # else student and critic would hold theirs at the same time
        return norm

    def _source(self, effects: Tensor, kinds: Tensor | None, row: int) -> str:
        """Effect and term of a row, for messages."""
        effect = effects[row]
        name = repr(self.data.effects[effect]) if effect >= 0 else "of the general stream"
        return f"effect {name}" + ("" if kinds is None else f", term {('dmd_bs', 'dmd_ts', 'anchor')[kinds[row]]}")

    def _set_learning_rate(self, progress: float) -> None:
        """Lets the rates fall linearly to a fiftieth over each phase, anchoring and what follows."""
        train = self.config.train
        share = self.anchor_share
        anchoring = progress < share
        left = 1 - progress / share if anchoring else (1 - progress) / (1 - share)
        factor = 0.02 + 0.98 * left
        rate = (anchoring and train.anchor_learning_rate) or train.learning_rate
        self.student_optimizer.param_groups[0]["lr"] = rate * factor
        self.critic_optimizer.param_groups[0]["lr"] = train.critic_learning_rate * factor

    def save(self, path: Path) -> None:
        """Writes everything that a bit-exact resume needs."""
        tensors = self.sampler.state()
        for name, slots in self._trained.items():
            tensors |= {f"{name}.{i}": parameter for i, parameter in enumerate(slots.parameters())}
        values = {
            "update": self.update,
            "seconds": self.seconds,
            "matching": self.matching,
            "config": resumable_settings(self.config),
            "teachers": self._teacher_norms,
        }
        save_state(path, tensors, self._optimizers, self.generator, values)

    def load(self, path: Path) -> None:
        """Restores a state written by `save`.

        Raises:
            CloraError: the file is broken, or comes from another configuration.
        """
        tensors, values = load_state(path, self._optimizers, self.generator)
        check_same(values["config"], resumable_settings(self.config), path)
        check_same(values["teachers"], self._teacher_norms, path)
        for name, slots in self._trained.items():
            for i, parameter in enumerate(slots.parameters()):
                parameter.data.copy_(tensors[f"{name}.{i}"])
        self.bank.write(CRITIC, self.critic)
        self.sampler.load_state(tensors)
        self.update = int(values["update"])
        self.seconds = float(values["seconds"])
        self.matching = bool(values["matching"])

    @cached_property
    def _teacher_norms(self) -> dict[str, str]:
        """Each teacher's norm, by which a resumed run notices that a file was replaced."""
        squares = self.bank.squared_norms()
        return {f"teacher {name}": f"{squares[name]:.6g}" for name in self.data.effects}


def _teacher_ids(effect: Tensor) -> Tensor:
    """The bank's LoRA of each row's teacher: the critic's is the first, and -1 is the base."""
    return torch.where(effect >= 0, effect + 1, -1)
