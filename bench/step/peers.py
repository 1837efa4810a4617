"""The update of `clora.training`, written for models that hold one LoRA at a time.

The draws are those of `clora.training.steps`, in its order, and so the losses must be equal. What costs others more than
needed is left out: a simulation ends at the step that was drawn, and student and critic share it. The code released with
the paper simulates all eight steps for both, computes losses in fp64 and keeps three graphs at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.step.world import World
from clora.data.batches import Batch, BatchSampler
from clora.flow.matching import add_noise, sample_sigma, student_schedule, velocity_to_x0
from clora.flow.objective import draw_anchor_sigma, draw_backward_steps, draw_critic_sigma, draw_target_steps
from clora.flow.sampling import guided, simulate_to_step
from clora.lora.state import LoRAState
from clora.models.conditioning import Conditioning
from clora.ops import BACKWARD_SIMULATION, TARGET_SIMULATION
from clora.training.optimizers import make_optimizer
from clora.training.student import initial_student
from clora.training.trainer import Report

TERMS = {BACKWARD_SIMULATION: "dmd_bs", TARGET_SIMULATION: "dmd_ts"}
STUDENT, CRITIC, TEACHER, BASE = "student", "critic", "teacher", "base"


class Matching(NamedTuple):
    """Rows of distribution matching: the sample, the kind, the student's input and noise, and the draws that score it."""

    sample: Tensor
    kind: Tensor
    x: Tensor
    sigma: Tensor
    score_sigma: Tensor
    score_noise: Tensor

    def rows(self, picked: Tensor) -> Matching:
        return Matching(*(field[picked] for field in self))


class Anchors(NamedTuple):
    """Rows of trajectory anchoring: the sample, the student's input and noise, and the velocity to learn."""

    sample: Tensor
    x: Tensor
    sigma: Tensor
    target: Tensor

    def rows(self, picked: Tensor) -> Anchors:
        return Anchors(*(field[picked] for field in self))


class PeerTrainer(ABC):
    """The loop of updates; a subclass has the models."""

    def __init__(self, world: World):
        self.config = world.config
        self.device = world.device
        self.adapter = world.adapter()
        self.effects = world.effects
        teachers = world.teachers(self.adapter.pipeline.transformer)
        student = initial_student(self.config, self.adapter.pipeline.transformer, list(teachers.values()))
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.sampler = BatchSampler(
            world.data(self.adapter), self.config.objective, world.case.samples, self.generator, world.device
        )
        self.shift = self.config.sampler.shift
        self.sigmas = student_schedule(self.config.sampler.steps, self.shift)
        parameters = self.load(world, student, teachers)
        train = self.config.train
        self.parameters = parameters
        self.optimizers = {
            STUDENT: make_optimizer("adamw", parameters[STUDENT], train.learning_rate, 32),
            CRITIC: make_optimizer("adamw", parameters[CRITIC], train.critic_learning_rate, 32),
        }

    @abstractmethod
    def load(self, world: World, student: LoRAState, teachers: Mapping[str, LoRAState]) -> dict[str, list[Tensor]]:
        """Builds the models from student (which the critic starts from) and teachers; returns what is trained of each."""

    @abstractmethod
    def velocity(self, name: str, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the velocities of rows under the student or the critic."""

    @abstractmethod
    def scores(self, effect: Tensor, x: Tensor, sigma: Tensor, conditionings: Sequence[Conditioning]) -> list[Tensor]:
        """Returns the velocities of the critic, of each row's teacher, and of the teacher under the empty prompt."""

    @abstractmethod
    def parts(self, samples: Tensor) -> Iterator[Tensor]:
        """Splits trained rows, given by their samples, into those of one pass each."""

    def fit(self, report: Report) -> None:
        """Makes all updates."""
        for update in range(self.config.train.updates):
            batch = self.sampler.draw(update)
            x, sigma = self.simulate(batch)
            values = {"critic": self.critic_step(batch, x, sigma)} | self.student_step(batch, x, sigma)
            report(update + 1, values)

    @torch.no_grad()
    def simulate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns noisy latents on the student's own trajectories, and their noise levels."""
        steps = draw_backward_steps(len(batch), len(self.sigmas), self.generator)

        def velocity(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            return self.velocity(STUDENT, x, sigma, batch.student[rows])

        noise = self.noise(batch.target).to(self.adapter.latent_dtype)
        return simulate_to_step(velocity, noise, self.sigmas, steps, self.generator), self.sigmas[steps]

    def critic_step(self, batch: Batch, x: Tensor, sigma: Tensor) -> float:
        """Trains the critic on the student's predictions; returns its loss."""
        with torch.no_grad():
            x0 = velocity_to_x0(x.float(), self.velocity(STUDENT, x, sigma, batch.student), sigma)
        noise = self.noise(x0)
        sigma = sample_sigma(len(x0), self.shift, self.generator)
        x = add_noise(x0, noise, sigma)
        total = 0.0
        for rows in self.parts(torch.arange(len(x0))):
            velocity = self.velocity(CRITIC, x[rows], sigma[rows], batch.student[rows]).float()
            loss = row_means((velocity - (noise[rows] - x0[rows])).square()).sum() / len(x0)
            loss.backward()
            total += float(loss.detach())
        self.step(CRITIC)
        return total

    def student_step(self, batch: Batch, x: Tensor, sigma: Tensor) -> dict[str, float]:
        """Trains the student by the coarse-to-fine objective; returns its terms."""
        matching, anchors = self.draw(batch, x, sigma)
        terms: dict[str, float] = defaultdict(float)
        for picked in self.parts(matching.sample):
            for name, loss in self.match(batch, matching, picked).items():
                terms[name] += loss
        for picked in self.parts(anchors.sample):
            rows = anchors.rows(picked)
            velocity = self.velocity(STUDENT, rows.x, rows.sigma, batch.student[rows.sample]).float()
            loss = row_means((velocity - rows.target).square()).sum() / len(anchors.sample)
            loss.backward()
            terms["anchor"] += float(loss.detach())
        self.step(STUDENT)
        return terms

    def draw(self, batch: Batch, x: Tensor, sigma: Tensor) -> tuple[Matching, Anchors]:
        """Draws the student's inputs, and the noise that scores them."""
        dtype = self.adapter.latent_dtype
        effects = torch.nonzero(batch.effect >= 0).flatten()
        steps = draw_target_steps(len(effects), len(self.sigmas), self.generator)
        target = batch.target[effects]
        noised = add_noise(target, self.noise(target), self.sigmas[steps]).to(dtype)
        kind = torch.tensor([BACKWARD_SIMULATION] * len(batch) + [TARGET_SIMULATION] * len(effects))
        score_sigma = draw_critic_sigma(kind, self.shift, self.generator)
        anchored = torch.nonzero(batch.has_target).flatten()
        target = batch.target[anchored]
        anchor_sigma = draw_anchor_sigma(len(anchored), self.shift, self.generator)
        anchor_noise = self.noise(target)
        anchor_x = add_noise(target, anchor_noise, anchor_sigma).to(dtype)
        matching = Matching(
            sample=torch.cat([torch.arange(len(batch)), effects]),
            kind=kind,
            x=torch.cat([x, noised]),
            sigma=torch.cat([sigma, self.sigmas[steps]]),
            score_sigma=score_sigma,
            score_noise=self.noise(batch.target.new_empty(len(kind), *batch.target.shape[1:])),
        )
        return matching, Anchors(anchored, anchor_x, anchor_sigma, anchor_noise - target)

    def match(self, batch: Batch, matching: Matching, picked: Tensor) -> dict[str, float]:
        """Adds the gradient of some rows of distribution matching; returns their terms."""
        rows = matching.rows(picked)
        student = batch.student[rows.sample]
        x0 = velocity_to_x0(rows.x.float(), self.velocity(STUDENT, rows.x, rows.sigma, student), rows.sigma)
        with torch.no_grad():
            renoised = add_noise(x0, rows.score_noise, rows.score_sigma).to(self.adapter.latent_dtype)
            conditionings = (student, batch.teacher[rows.sample], batch.uncond[rows.sample])
            scores = self.scores(batch.effect[rows.sample], renoised, rows.score_sigma, conditionings)
            fake, cond, uncond = (velocity_to_x0(renoised.float(), v.float(), rows.score_sigma) for v in scores)
            real = guided(cond, uncond, self.config.sampler.guidance)
            gradient = (fake - real) / row_means((x0 - real).abs()).view(-1, 1, 1)
        # Its value is half the mean square of `gradient`, and its gradient on x0 is `gradient` over the row's elements.
        losses = 0.5 * row_means((x0 - (x0 - gradient).detach()).square())
        # Each kind's mean over its own rows.
        shares = losses / torch.bincount(matching.kind)[rows.kind].to(losses.device)
        shares.sum().backward()
        return {name: float(shares.detach()[rows.kind == kind].sum()) for kind, name in TERMS.items()}

    def step(self, name: str) -> None:
        """Clips the gradient and steps the optimizer."""
        torch.nn.utils.clip_grad_norm_(self.parameters[name], self.config.train.clip)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)


class ThreeCopies(PeerTrainer):
    """Three copies of the model, each with one LoRA of PEFT's; teachers are copied into the third. One row a pass."""

    def load(self, world: World, student: LoRAState, teachers: Mapping[str, LoRAState]) -> dict[str, list[Tensor]]:
        self.cache = {name: factors_of(state) for name, state in teachers.items()}
        first = next(iter(self.cache.values()))
        self.cache[BASE] = [torch.zeros_like(factor) for factor in first]
        self.models, factors = {}, {}
        for name in (STUDENT, CRITIC, TEACHER):
            # The first copy is that of the adapter itself.
            transformer = (self.adapter if name == STUDENT else world.adapter()).pipeline.transformer
            state = next(iter(teachers.values())) if name == TEACHER else student
            self.models[name] = peft_model(transformer, {name: state})
            factors[name] = parameters_of(self.models[name], name)
        self.teacher_factors = factors.pop(TEACHER)
        for factor in self.teacher_factors:
            factor.requires_grad_(False)
        self.active = None
        return factors

    def parts(self, samples: Tensor) -> Iterator[Tensor]:
        # All rows of a sample, one after the other: its teacher is copied once.
        return rows_of(samples.argsort(stable=True), 1)

    def velocity(self, name: str, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.adapter.pipeline.transformer = self.models[name]
        rows = [
            self.adapter.velocity(x[row], sigma[row].to(x.device), conditioning[row])
            for row in (slice(i, i + 1) for i in range(len(x)))
        ]
        return torch.cat(rows)

    def scores(self, effect: Tensor, x: Tensor, sigma: Tensor, conditionings: Sequence[Conditioning]) -> list[Tensor]:
        student, teacher, empty = conditionings
        self.switch(self.effects[effect] if effect >= 0 else BASE)
        return [
            self.velocity(CRITIC, x, sigma, student),
            self.velocity(TEACHER, x, sigma, teacher),
            self.velocity(TEACHER, x, sigma, empty),
        ]

    def switch(self, name: str) -> None:
        """Copies a teacher into the third model, unless it is there."""
        if name != self.active:
            for own, other in zip(self.teacher_factors, self.cache[name], strict=True):
                own.copy_(other)
            self.active = name


class PeftMixed(PeerTrainer):
    """One model with all LoRAs of PEFT's. Scoring mixes them by `adapter_names`, which PEFT refuses in training mode.

    So a pass that is trained runs under one LoRA, that of student or critic, set before it.
    """

    def load(self, world: World, student: LoRAState, teachers: Mapping[str, LoRAState]) -> dict[str, list[Tensor]]:
        self.model = peft_model(self.adapter.pipeline.transformer, {STUDENT: student, CRITIC: student, **teachers})
        return {name: parameters_of(self.model, name) for name in (STUDENT, CRITIC)}

    def parts(self, samples: Tensor) -> Iterator[Tensor]:
        return rows_of(torch.arange(len(samples)), self.config.train.stated_rows or len(samples))

    def velocity(self, name: str, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.model.train()
        self.model.set_adapter(name)
        self.adapter.pipeline.transformer = self.model
        return self.adapter.velocity(x, sigma.to(x.device), conditioning)

    def scores(self, effect: Tensor, x: Tensor, sigma: Tensor, conditionings: Sequence[Conditioning]) -> list[Tensor]:
        teachers = [self.effects[e] if e >= 0 else "__base__" for e in effect.tolist()]
        self.model.eval()
        self.adapter.pipeline.transformer = Mixed(self.model, [CRITIC] * len(effect) + 2 * teachers)
        velocities = self.adapter.velocity(
            x.repeat(3, 1, 1), sigma.repeat(3).to(x.device), Conditioning.cat(conditionings)
        )
        return list(velocities.chunk(3))


class Mixed:
    """PEFT's model with a LoRA's name for each sample, as a pipeline's transformer."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model = model
        self.names = list(names)
        self.dtype = model.dtype

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs, adapter_names=self.names)


def peft_model(transformer: nn.Module, loras: Mapping[str, LoRAState]) -> nn.Module:
    """PEFT's model around a transformer, with these LoRAs."""
    import peft

    model = None
    for name, state in loras.items():
        # PEFT scales by alpha / rank, here 1.
        config = peft.LoraConfig(r=state.max_rank, lora_alpha=state.max_rank, target_modules=list(state.modules))
        if model is None:
            model = peft.get_peft_model(transformer, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        with torch.no_grad():
            for own, other in zip(parameters_of(model, name), factors_of(state), strict=True):
                own.copy_(other)
    return model


def parameters_of(model: nn.Module, name: str) -> list[Tensor]:
    """The factors of one of a model's LoRAs, layer by layer."""
    return [
        p for key, p in model.named_parameters() if key.endswith((f"lora_A.{name}.weight", f"lora_B.{name}.weight"))
    ]


def factors_of(state: LoRAState) -> list[Tensor]:
    """A LoRA's factors, in the same order."""
    return [factor for module in state.modules.values() for factor in (module.lora_A, module.lora_B)]


def rows_of(rows: Tensor, limit: int) -> Iterator[Tensor]:
    """Rows in parts of at most ``limit``; no part of no rows."""
    return iter(rows.split(limit) if len(rows) else ())


def row_means(x: Tensor) -> Tensor:
    """The mean of each row ``[R]``."""
    return x.flatten(1).mean(1)
