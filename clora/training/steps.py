"""The steps that train student and critic: rows, forward passes, losses and updates of one batch.

Source: docs/method.md section 4(c, d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.slots import Slots
from clora.config.settings import DistillConfig
from clora.data.batches import Batch
from clora.devices import send, take
from clora.flow.matching import add_noise, sample_sigma, student_schedule, velocity_to_x0
from clora.flow.objective import (
    critic_loss,
    draw_anchor_sigma,
    draw_backward_steps,
    draw_critic_sigma,
    draw_target_steps,
)
from clora.flow.sampling import guided, simulate_to_step
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning
from clora.ops import ANCHOR, BACKWARD_SIMULATION, TARGET_SIMULATION, Scores, coarse_to_fine_loss
from clora.training.divergence import base_size, relative_change
from clora.training.faults import StepCheck
from clora.training.memory import free_memory, kept_bytes, rows_that_fit
from clora.training.rows import Part, StudentRows, kinds, slices

STUDENT, CRITIC = "student", "critic"


class Rollout(NamedTuple):
    """The student's own trajectories, each up to a random step.

    Attributes:
        x: ``[B, T, C]`` noisy latents in the adapter's ``latent_dtype``.
        sigma: ``[B]`` their noise levels, on the CPU.
    """

    x: Tensor
    sigma: Tensor


class TrainingSteps:
    """Student and critic on one bank, and the steps that train them.

    Args:
        config: objective, sampler and training settings.
        adapter: the model family, around the pipeline whose transformer carries the bank.
        bank: as in `DistillTrainer`.
        effects: their names, in the bank's order.
        trained: `STUDENT` and `CRITIC`, trained slots of the bank.
        optimizers: one for each of them.
        generator: source of every draw, on the CPU.

    Attributes:
        gradient_rows: the most rows of a pass with gradients; None for no bound, also before `choose_rows`.
    """

    def __init__(
        self,
        config: DistillConfig,
        adapter: ModelAdapter,
        bank: AdapterBank,
        effects: Sequence[str],
        trained: Mapping[str, Slots],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generator: torch.Generator,
    ):
        self.config = config
        self.adapter = adapter
        self.bank = bank
        self.effects = effects
        self.student = trained[STUDENT]
        self.critic = trained[CRITIC]
        self.optimizers = optimizers
        self.generator = generator
        self._base_size = base_size(bank.transformer, self.student)
        self.dtype = adapter.latent_dtype
        self.sigmas = student_schedule(config.sampler.steps, config.sampler.shift)
        self.gradient_rows = config.train.stated_rows

    def choose_rows(self, conditioning: Conditioning) -> None:
        """Sets `gradient_rows` to what fills the products and fits the free memory.

        Args:
            conditioning: a row of it.
        """
        x = torch.zeros(1, *self.adapter.latent_shape, dtype=self.dtype, device=self.bank.transformer.device)
        conditioning = conditioning.to(x.device)

        def run() -> Tensor:
            return self._velocity(self.student, 0, x, self.sigmas[:1], conditioning)

        # Weights and factors stay anyway: only what the pass adds counts.
        row_bytes = kept_bytes(run, (*self.bank.transformer.parameters(), *self.student.parameters()))
        tokens = x.shape[1] + conditioning.source.shape[1] + conditioning.text.embeds.shape[1]
        self.gradient_rows = rows_that_fit(tokens, row_bytes, free_memory(x.device), x.device.type)

    @torch.no_grad()
    def start_critic(self) -> None:
        """Sets the critic to the student, whose samples it must model; anchoring trains only the student."""
        for critic, student in zip(self.critic.parameters(), self.student.parameters(), strict=True):
            critic.copy_(student)
        self.bank.write(CRITIC, self.critic)

    def predict(self, batch: Batch, rollout: Rollout) -> Tensor | None:
        """Returns the student's velocity ``[B, T, C]`` on its rollout with its graph, which both steps take; or None.

        The critic models the predictions there, and the student's own step begins with the same rows: it has not changed
        in between. None where that step has no such rows, or where the graph has no room beside the critic's.
        """
        if not self.config.shares_prediction(self.gradient_rows):
            return None
        x, sigma = rollout
        return self._velocity(self.student, 0, x, sigma, batch.student)

    def student_step(self, batch: Batch, rollout: Rollout | None = None, predicted: Tensor | None = None) -> StepCheck:
        """One update of the student by the coarse-to-fine objective (method.md section 4c).

        Args:
            batch: the samples.
            rollout: from `simulate` of this batch; None for trajectory anchoring only.
            predicted: from `predict` of these; its graph is used up.
        """
        rows = self._student_rows(batch, rollout)
        # One part after the other, so that only its activations are in memory; the gradients add up. What is predicted
        # are the first rows of the first part.
        first, *others = rows.split(self.gradient_rows)
        parts = [self._learn(first, predicted), *(self._learn(part) for part in others)]
        norm = self._step(self.optimizers[STUDENT], self.student)
        values = {}
        for name in ("dmd_bs", "dmd_ts", "anchor", "loss"):
            values[name] = sum(terms[name] for terms in parts)
        return StepCheck(
            "the student",
            values,
            nonfinite=torch.cat([terms["nonfinite"] for terms in parts]),
            gradient_norm=norm,
            change=self.change(self.student),
            strength=torch.cat([terms["gradient_norm"] for terms in parts]),
            strongest="strongest",
            rates="train.learning_rate, or train.anchor_learning_rate while it anchors",
            source=partial(self._source, rows.effect, rows.kind),
        )

    def _learn(self, rows: StudentRows, predicted: Tensor | None = None) -> dict[str, Tensor]:
        """Adds the gradient of some of an update's rows, the first of them predicted; returns the terms of their loss."""
        rest = slice(0 if predicted is None else len(predicted), len(rows.x))
        velocities = [] if predicted is None else [predicted]
        if rest.start < rest.stop:
            velocities.append(self._velocity(self.student, 0, rows.x[rest], rows.sigma[rest], rows.conditioning[rest]))
        velocity = torch.cat(velocities)
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

    def critic_step(self, batch: Batch, rollout: Rollout, predicted: Tensor | None = None) -> StepCheck:
        """One update of the critic by flow matching on fresh student samples (method.md section 4d).

        Args:
            batch: the samples.
            rollout: from `simulate` of this batch.
            predicted: from `predict` of these; None to compute it here, without gradient.
        """
        x, sigma = rollout
        with torch.no_grad():
            velocity = self._velocity(self.student, 0, x, sigma, batch.student) if predicted is None else predicted
            x0 = velocity_to_x0(x.float(), velocity, sigma)
        noise = self._noise(x0)
        sigma = sample_sigma(len(x0), self.config.sampler.shift, self.generator)
        x = add_noise(x0, noise, sigma)
        parts = []
        for c in slices(len(x0), self.gradient_rows):
            velocity = self._velocity(self.critic, 0, x[c], sigma[c], batch.student[c])
            loss, losses = critic_loss(velocity, noise[c], x0[c])
            # The loss is a mean over rows: a part counts with its share of them, so that the gradients add up.
            (loss * (len(losses) / len(x0))).backward()
            parts.append(losses)
        norm = self._step(self.optimizers[CRITIC], self.critic)
        self.bank.write(CRITIC, self.critic)
        losses = torch.cat(parts)
        return StepCheck(
            "the critic",
            {"critic": losses.mean()},
            nonfinite=~torch.isfinite(losses),
            gradient_norm=norm,
            change=self.change(self.critic),
            strength=losses,
            strongest="largest loss",
            rates="train.critic_learning_rate",
            source=partial(self._source, batch.effect, None),
        )

    def _student_rows(self, batch: Batch, rollout: Rollout | None) -> StudentRows:
        """The rows of one student forward: backward simulation, target simulation, trajectory anchoring."""
        objective = self.config.objective
        shift = self.config.sampler.shift
        simulated = objective.backward_simulation and rollout is not None
        parts = []
        # Distribution matching at two kinds of inputs: the student's own noisy samples, and noised targets at a step
        # of its schedule below TAU_MAX. General rows have no target of a teacher to start from.
        if simulated:
            parts.append(Part(BACKWARD_SIMULATION, batch, *rollout, objective.weights.backward_simulation))
        effects = batch[batch.effect >= 0]
        if objective.target_simulation and rollout is not None and len(effects):
            steps = draw_target_steps(len(effects), len(self.sigmas), self.generator)
            x = add_noise(effects.target, self._noise(effects.target), self.sigmas[steps])
            x = x.to(self.dtype)
            parts.append(Part(TARGET_SIMULATION, effects, x, self.sigmas[steps], objective.weights.target_simulation))
        # These D rows are scored: their predictions are noised again to a level of their own.
        kind = kinds(parts)
        score_sigma = draw_critic_sigma(kind, shift, self.generator)
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
        num_samples = len(batch) if objective.weighting == "per_sample" else None
        return StudentRows.join(parts, score_sigma, score_noise, anchor_target, num_samples)

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
        teachers = teacher_ids(rows.effect[:n])
        ids = [torch.zeros(n, dtype=torch.int64), teachers, teachers][:repeats]
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
        # Without a bound of its own, scoring takes little memory beside the graph that waits for it.
        limit = self.config.train.forward_rows or 2 * (self.gradient_rows or len(ids))
        # Sorted, so that the rows of a LoRA are neighbours: they are one product, and it is copied to the device once.
        order = torch.argsort(ids, stable=True)
        velocities = torch.empty_like(x)
        for c in self.bank.chunks(ids[order], limit):
            rows = order[c]
            with self.bank.placed(ids[rows]) as slots:
                velocity = self._velocity(slots, ids[rows], take(x, rows), sigma[rows], conditioning[rows])
            velocities[send(rows, x.device)] = velocity
        return velocities

    def _velocity(
        self, slots: Slots, ids: Tensor | int, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        with self.bank.route(slots, [ids] * len(x) if isinstance(ids, int) else ids):
            return self.adapter.velocity(x, send(sigma, x.device), conditioning)

    def _noise(self, like: Tensor) -> Tensor:
        return send(torch.randn(like.shape, generator=self.generator), like.device, like.dtype)

    def _step(self, optimizer: torch.optim.Optimizer, slots: Slots) -> Tensor:
        """Clips the gradients, makes a step and drops them; returns their norm ``[]`` before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(slots.parameters(), self.config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # else student and critic would hold theirs at the same time
        return norm

    def change(self, slots: Slots) -> Tensor:
        """Returns the size ``[]`` of the student's or the critic's change of the base (`relative_change`)."""
        return relative_change(slots, self._base_size)

    def _source(self, effects: Tensor, kinds: Tensor | None, row: int) -> str:
        """Effect and term of a row, for messages."""
        effect = effects[row]
        name = repr(self.effects[effect]) if effect >= 0 else "of the general stream"
        return f"effect {name}" + ("" if kinds is None else f", term {('dmd_bs', 'dmd_ts', 'anchor')[kinds[row]]}")


def teacher_ids(effect: Tensor) -> Tensor:
    """The bank's LoRA of each row's teacher: the critic's is the first, and -1 is the base."""
    return torch.where(effect >= 0, effect + 1, -1)
