"""Batched generation through a bank: different sources, prompts and adapters in one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.slots import Slots
from clora.devices import send
from clora.flow.matching import student_schedule
from clora.flow.sampling import euler_sample, few_step_sample, guided
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning, Text

Report = Callable[[int], None]
"""``report(passes)``, called with the rows of each pass through the transformer."""


class Generator:
    """Samples from slots of a bank, or from a plain transformer where bank and slots are None.

    Noise is drawn per sample from its own seed, so that a result does not depend on the batch it was computed in.
    Inputs and outputs are on the CPU; one batch at a time is on the transformer's device. Latents are in the dtype
    that a stock call keeps them in.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        bank: AdapterBank | None,
        slots: Slots | None,
        shift: float,
        batch_size: int = 24,
        report: Report = lambda passes: None,
    ):
        self.adapter = adapter
        self.bank = bank
        self.slots = slots
        self.shift = shift
        self.batch_size = batch_size
        self.report = report
        self.device = adapter.pipeline.transformer.device
        self.dtype = adapter.latent_dtype

    def guided_euler(
        self,
        ids: Tensor,
        conditioning: Conditioning,
        empty_text: Text,
        seeds: list[int],
        steps: int,
        guidance: float,
        norm_rescale: bool = False,
    ) -> Tensor:
        """The teachers' sampler: ``steps`` Euler steps with guidance w, two passes each; latents ``[N, T, C]``.

        The noise levels are those of a stock call. ``empty_text`` has one row, or one for each sample. With w = 0 it is
        not read and a step is one pass.
        """
        if guidance == 0:
            return self.euler(ids, conditioning, seeds, steps)
        sigmas = self.adapter.teacher_schedule(steps)
        empty_text = empty_text[torch.zeros(len(ids), dtype=torch.int64)] if len(empty_text) == 1 else empty_text

        def sample(rows: slice) -> Tensor:
            # Both passes of a step are one batch of 2 N rows: with the prompts, then with the empty ones.
            cond = conditioning[rows]
            both = Conditioning.cat([cond, cond.with_text(empty_text[rows])]).to(self.device)

            def velocity(x: Tensor, sigma: Tensor) -> Tensor:
                v = self._velocity(ids[rows].repeat(2), x.repeat(2, 1, 1), sigma.repeat(2), both)
                return guided(*v.chunk(2), guidance, norm_rescale)

            return euler_sample(velocity, self._noise(seeds[rows]), sigmas)

        return self._batched(sample, len(ids))

    def euler(self, ids: Tensor, conditioning: Conditioning, seeds: list[int], steps: int) -> Tensor:
        """Plain Euler steps without guidance; latents ``[N, T, C]``."""
        sigmas = self.adapter.teacher_schedule(steps)

        def sample(rows: slice) -> Tensor:
            velocity = self._conditioned(ids[rows], conditioning[rows])
            return euler_sample(velocity, self._noise(seeds[rows]), sigmas)

        return self._batched(sample, len(ids))

    def few_step(self, ids: Tensor, conditioning: Conditioning, seeds: list[int], steps: int) -> Tensor:
        """The student's stochastic few-step sampler without guidance; latents ``[N, T, C]``."""
        sigmas = student_schedule(steps, self.shift)

        def sample(rows: slice) -> Tensor:
            # Draw 0 of a sample's noise is the start, the others noise its predictions again.
            noises = [self._noise(seeds[rows], k + 1) for k in range(steps - 1)]
            velocity = self._conditioned(ids[rows], conditioning[rows])
            return few_step_sample(velocity, self._noise(seeds[rows]), sigmas, noises=noises)

        return self._batched(sample, len(ids))

    def _conditioned(self, ids: Tensor, conditioning: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
        conditioning = conditioning.to(self.device)
        return lambda x, sigma: self._velocity(ids, x, sigma, conditioning)

    def _velocity(self, ids: Tensor, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.report(len(x))
        if self.bank is None:
            return self.adapter.velocity(x, sigma, conditioning)
        with self.bank.route(self.slots, send(ids, x.device)):
            return self.adapter.velocity(x, sigma, conditioning)

    def _noise(self, seeds: list[int], draw: int = 0) -> Tensor:
        """Noise of each sample ``[B, T, C]``, in the latents' dtype on the device; ``draw`` counts those of a sample."""
        # Drawn in fp32 on the CPU, so that it is the same whatever the device and the dtype.
        generators = [torch.Generator().manual_seed(1000 * seed + draw) for seed in seeds]
        noises = [torch.randn(self.adapter.latent_shape, generator=generator) for generator in generators]
        return send(torch.stack(noises), self.device, self.dtype)

    @torch.no_grad()
    def _batched(self, sample: Callable[[slice], Tensor], count: int) -> Tensor:
        return torch.cat([sample(slice(i, i + self.batch_size)).cpu() for i in range(0, count, self.batch_size)])
