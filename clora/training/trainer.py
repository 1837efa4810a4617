"""The distillation: student and critic trained against many teachers, all slots of one bank on one frozen base.

Source: docs/method.md section 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path

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
from clora.training.checkpoint import _check_same, _resumable, load_state, save_state
from clora.training.faults import Readings, Rows, step_faults
from clora.training.optimizers import make_optimizer
from clora.training.rows import Part, StudentRows, slices

STUDENT, CRITIC = "student", "critic"
Rollout = tuple[Tensor, Tensor]
"""Noisy latents ``[B, T, C]`` in the adapter's ``latent_dtype``, and their noise levels ``[B]``."""
Report = Callable[[int, Mapping[str, float]], None]


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
        train = config.train
        bits = train.optimizer_bits
        self.student_optimizer = make_optimizer(train.optimizer, self.student.parameters(), train.learning_rate, bits)
        self.critic_optimizer = make_optimizer("adamw", self.critic.parameters(), train.critic_learning_rate, bits)
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
            report: called as ``report(update, values)`` after every student update.
            checkpoint: resumed from if it exists, written every ``train.checkpoint_every`` updates and at the end.

        Raises:
            CloraError: a loss or gradient is not finite; names update, effect and term.
        """
        train = self.config.train
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
        with recomputed_blocks(self.bank) if train.gradient_checkpointing else nullcontext():
            self._run(report, checkpoint)
        if checkpoint is not None:
            self.save(checkpoint)  # what follows may fail, for example on a full disk

    def _run(self, report: Report, checkpoint: Path | None) -> None:
        train, start = self.config.train, time.monotonic() - self.seconds
        while (progress := self._progress()) < 1:
            self._set_learning_rate(progress)
            values = self._iterate(progress).read()
            self.update += 1
            self.seconds = time.monotonic() - start
            report(self.update, values)
            if checkpoint is not None and self.update % train.checkpoint_every == 0:
                self.save(checkpoint)

    def _progress(self) -> float:
        """The share of the run that is done, by updates or by time, whichever is more."""
        train = self.config.train
        passed = 0.0 if train.minutes is None else self.seconds / (60 * train.minutes)
        return max(self.update / train.updates, passed)

    def _iterate(self, progress: float) -> Readings:
        """One student update and the critic updates that precede it."""
        if progress < self.anchor_share:
            return self.student_step(self.sampler.draw_targets(self.update))
        if not self.matching and self.anchor_share > 0:
            self._start_critic()
        self.matching = True
        objective, ratio = self.config.objective, self.config.train.critic_ratio
        if not (objective.backward_simulation or objective.target_simulation):  # nothing for a critic to score
            return self.student_step(self.sampler.draw(self.update))
        readings = Readings({})
        for i in range(ratio):
            batch = self.sampler.draw(self.update * ratio + i)
            if i == ratio - 1:  # the student's batch: its teachers arrive while the student samples
                self.bank.fetch(_teacher_ids(batch.effect))
            rollout = self.simulate(batch)
            readings |= self.critic_step(batch, rollout)
        return readings | self.student_step(batch, rollout)  # the student has not changed since: a simulation saved

    @torch.no_grad()
    def _start_critic(self) -> None:
        """Sets the critic to the student, whose samples it must model; anchoring trains the student alone."""
        for critic, student in zip(self.critic.parameters(), self.student.parameters(), strict=True):
            critic.copy_(student)
        self.bank.write(CRITIC, self.critic)

    def student_step(self, batch: Batch, rollout: Rollout | None = None) -> Readings:
        """One update of the student by the coarse-to-fine objective (method.md section 4c).

        Args:
            batch: the samples.
            rollout: from `simulate` of this batch; None for trajectory anchoring alone.
        """
        rows = self._student_rows(batch, rollout)
        parts = [self._learn(part) for part in rows.split(self.config.train.gradient_rows)]
        norm = self._step(self.student_optimizer, self.student)
        values = {name: sum(terms[name] for terms in parts) for name in ("dmd_bs", "dmd_ts", "anchor", "loss")}
        nonfinite, strength = (torch.cat([terms[name] for terms in parts]) for name in ("nonfinite", "gradient_norm"))
        seen = Rows(nonfinite, strength, "strongest", partial(self._source, rows.effect, rows.kind))
        return Readings(values, step_faults(f"update {self.update + 1}: the student", seen, norm))

    def _learn(self, rows: StudentRows) -> dict[str, Tensor]:
        """Adds the gradient of some of an update's rows; the terms of their loss."""
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
        velocity.backward(terms.pop("velocity_gradient"))
        return terms | {"loss": loss.detach()}

    def critic_step(self, batch: Batch, rollout: Rollout) -> Readings:
        """One update of the critic by flow matching on fresh student samples (method.md section 4d)."""
        x, sigma = rollout
        with torch.no_grad():
            x0 = velocity_to_x0(x.float(), self._velocity(self.student, 0, x, sigma, batch.student), sigma)
        noise, sigma = self._noise(x0), sample_sigma(len(x0), self.config.sampler.shift, self.generator)
        x, parts = add_noise(x0, noise, sigma), []
        for c in slices(len(x0), self.config.train.gradient_rows):
            velocity = self._velocity(self.critic, 0, x[c], sigma[c], batch.student[c])
            loss, losses = critic_loss(velocity, noise[c], x0[c])
            (loss * (len(losses) / len(x0))).backward()
            parts.append(losses)
        norm = self._step(self.critic_optimizer, self.critic)
        self.bank.write(CRITIC, self.critic)
        rows = torch.cat(parts)
        seen = Rows(~torch.isfinite(rows), rows, "largest loss", partial(self._source, batch.effect, None))
        return Readings({"critic": rows.mean()}, step_faults(f"update {self.update + 1}: the critic", seen, norm))

    def _student_rows(self, batch: Batch, rollout: Rollout | None) -> StudentRows:
        """The rows of one student forward: backward simulation, target simulation, trajectory anchoring."""
        objective, parts = self.config.objective, []
        effects, anchored = batch[batch.effect >= 0], batch[batch.has_target]
        if objective.backward_simulation and rollout is not None:
            parts.append(Part(BACKWARD_SIMULATION, batch, *rollout, objective.weights.backward_simulation))
        if objective.target_simulation and rollout is not None and len(effects):
            steps = draw_target_steps(len(effects), self.sigmas, self.tau.tau_max, self.generator)
            x = add_noise(effects.target, self._noise(effects.target), self.sigmas[steps])
            x = x.to(self.dtype)
            parts.append(Part(TARGET_SIMULATION, effects, x, self.sigmas[steps], objective.weights.target_simulation))
        kind = torch.tensor([part.kind for part in parts for _ in range(len(part.batch))], dtype=torch.int64)
        score_sigma = draw_critic_sigma(kind, self.config.sampler.shift, self.tau.tau_min, self.generator)
        anchor_target = None
        if objective.trajectory_anchoring and len(anchored):
            sigma = draw_anchor_sigma(
                len(anchored), self.config.sampler.shift, self.generator, self._anchor_floor(batch, score_sigma)
            )
            noise = self._noise(anchored.target)
            anchor_target = noise - anchored.target
            x = add_noise(anchored.target, noise, sigma).to(self.dtype)
            parts.append(Part(ANCHOR, anchored, x, sigma, objective.weights.trajectory_anchoring))
        score_noise = self._noise(batch.target.new_empty(len(kind), *batch.target.shape[1:]))
        return StudentRows.join(parts, score_sigma, score_noise, anchor_target)

    def _anchor_floor(self, batch: Batch, score_sigma: Tensor) -> Tensor | None:
        """The released code's lower bound of the anchoring noise: the backward simulation's critic level per sample."""
        objective = self.config.objective
        if objective.anchor_noise == "unrestricted" or not objective.backward_simulation or not len(score_sigma):
            return None
        return score_sigma[: len(batch)][batch.has_target]

    @torch.no_grad()
    def simulate(self, batch: Batch) -> Rollout:
        """Backward simulation: noisy latents on the student's own trajectory, each at a random step."""
        steps = draw_backward_steps(len(batch), len(self.sigmas), self.generator)

        def velocity(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            return self._velocity(self.student, 0, x, sigma, batch.student[rows])

        noise = self._noise(batch.target).to(self.dtype)
        x = simulate_to_step(velocity, noise, self.sigmas, steps, self.generator)
        return x, self.sigmas[steps]

    @torch.no_grad()
    def _score(self, rows: StudentRows, velocity: Tensor) -> Scores:
        """Critic and teacher velocities of the re-noised predictions, in one routed pass.

        Three rows per sample: critic, teacher with its prompt and with the empty one; the last is left out where there
        is no guidance.
        """
        n = len(rows.teacher)
        x0 = velocity_to_x0(rows.x[:n].float(), velocity[:n], rows.sigma[:n])
        renoised = add_noise(x0, rows.score_noise, rows.score_sigma).to(self.dtype)
        parts = [rows.conditioning[slice(n)], rows.teacher, rows.uncond]
        parts = parts[: self.config.sampler.rows_per_scored_sample]
        ids = torch.cat([torch.zeros(n, dtype=torch.int64), *[_teacher_ids(rows.effect[:n])] * (len(parts) - 1)])
        sigma = rows.score_sigma.repeat(len(parts))
        scores = self._routed(ids, renoised.repeat(len(parts), 1, 1), sigma, Conditioning.cat(parts))
        critic, teacher, *rest = scores.chunk(len(parts))
        uncond = rest[0] if rest else teacher
        if self.config.objective.norm_rescale:
            w = self.config.sampler.guidance
            teacher = uncond = guided(teacher.float(), uncond.float(), w, norm_rescale=True)
        return Scores(renoised, send(rows.score_sigma, x0.device), critic, teacher, uncond)

    def _routed(self, ids: Tensor, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One pass over the bank's LoRAs, split by ``train.forward_rows`` and by the teachers that fit at once."""
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
        """Clips the gradients, makes a step and drops them; their norm ``[]`` before."""
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
        """Falls linearly to a fiftieth over each phase, anchoring and what follows."""
        train, share = self.config.train, self.anchor_share
        anchoring = progress < share
        left = 1 - progress / share if anchoring else (1 - progress) / (1 - share)
        factor = 0.02 + 0.98 * left
        rate = (anchoring and train.anchor_learning_rate) or train.learning_rate
        self.student_optimizer.param_groups[0]["lr"] = rate * factor
        self.critic_optimizer.param_groups[0]["lr"] = train.critic_learning_rate * factor

    def save(self, path: Path) -> None:
        """Writes everything a bit-exact resume needs."""
        tensors = {
            f"{name}.{i}": p for name, slots in self._trained().items() for i, p in enumerate(slots.parameters())
        }
        tensors["general"] = self.sampler._general
        optimizers = {STUDENT: self.student_optimizer, CRITIC: self.critic_optimizer}
        values = {
            "update": self.update,
            "seconds": self.seconds,
            "matching": self.matching,
            "config": _resumable(self.config),
            "teachers": self._teacher_norms,
        }
        save_state(path, tensors, optimizers, {"data": self.generator}, values)

    def load(self, path: Path) -> None:
        """Restores a state written by ``save``.

        Raises:
            CloraError: the file is broken, or comes from another configuration.
        """
        optimizers = {STUDENT: self.student_optimizer, CRITIC: self.critic_optimizer}
        tensors, values = load_state(path, optimizers, {"data": self.generator})
        _check_same(values["config"], _resumable(self.config), path)
        _check_same(values["teachers"], self._teacher_norms, path)
        for name, slots in self._trained().items():
            for i, parameter in enumerate(slots.parameters()):
                parameter.data.copy_(tensors[f"{name}.{i}"])
        self.bank.write(CRITIC, self.critic)
        self.sampler._general = tensors["general"]
        self.update, self.seconds = int(values["update"]), float(values["seconds"])
        self.matching = bool(values["matching"])

    @cached_property
    def _teacher_norms(self) -> dict[str, str]:
        """Each teacher's size, by which a resumed run sees that a file was replaced."""
        squares = self.bank.squared_norms()
        return {f"teacher {name}": f"{squares[name]:.6g}" for name in self.data.effects}

    def _trained(self) -> dict[str, Slots]:
        return {STUDENT: self.student, CRITIC: self.critic}


def _teacher_ids(effect: Tensor) -> Tensor:
    """The bank's LoRA of each row's teacher: the first is the critic, the base none."""
    return torch.where(effect >= 0, effect + 1, -1)
