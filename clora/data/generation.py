"""Batched generation through a bank: different sources, prompts and adapters in one batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

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
    """Samples from the LoRAs of a bank (or from ``slots``, such as trained ones), or from a plain transformer where it is None.

    Noise is drawn per sample from its own seed, so that a result does not depend on the batch it was computed in.
    Inputs and outputs are on the CPU; one batch at a time is on the transformer's device. Latents are in the dtype
    that a stock call keeps them in.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        bank: AdapterBank | None = None,
        batch_size: int = 24,
        report: Report = lambda passes: None,
        slots: Slots | None = None,
    ):
        self.adapter = adapter
        self.bank = bank
        self.batch_size = batch_size
        self.report = report
        self.slots = slots
        self.device = adapter.pipeline.transformer.device

    def euler(
        self,
        ids: Tensor,
        conditioning: Conditioning,
        seeds: list[int],
        steps: int,
        empty_text: Text | None = None,
        guidance: float = 0.0,
        norm_rescale: bool = False,
    ) -> Tensor:
        """The teachers' sampler: Euler steps with guidance w at the noise levels of a stock call; latents ``[N, T, C]``.

        A step is two passes; with w = 0 it is one and reads no ``empty_text``, which else has one row, or one for each
        sample.
        """
        sigmas = self.adapter.teacher_schedule(steps)
        if guidance != 0 and len(empty_text) == 1:
            empty_text = empty_text[torch.zeros(len(ids), dtype=torch.int64)]

        def sample(rows: slice) -> Tensor:
            noise = self._noise(seeds[rows])
            cond = conditioning[rows]
            if guidance == 0:
                return euler_sample(self._network(ids[rows], cond), noise, sigmas)
            # Both passes of a step are one batch of 2 N rows: with the prompts, then with the empty ones.
            both = Conditioning.cat([cond, replace(cond, text=empty_text[rows])])
            network = self._network(ids[rows].repeat(2), both)

            def velocity(x: Tensor, sigma: Tensor) -> Tensor:
                v = network(x.repeat(2, 1, 1), sigma.repeat(2))
                return guided(*v.chunk(2), guidance, norm_rescale)

            return euler_sample(velocity, noise, sigmas)

        return self._batched(sample, len(ids))

    def few_step(self, ids: Tensor, conditioning: Conditioning, seeds: list[int], steps: int, shift: float) -> Tensor:
        """The student's stochastic few-step sampler without guidance; latents ``[N, T, C]``."""
        sigmas = student_schedule(steps, shift)

        def sample(rows: slice) -> Tensor:
            # Draw 0 of a sample's noise is the start, the others noise its predictions again.
            noises = [self._noise(seeds[rows], k + 1) for k in range(steps - 1)]
            velocity = self._network(ids[rows], conditioning[rows])
            return few_step_sample(velocity, self._noise(seeds[rows]), sigmas, noises=noises)

        return self._batched(sample, len(ids))

    def _network(self, ids: Tensor, conditioning: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
        """``velocity(x, sigma)`` of B samples under these LoRAs ``[B]`` and this conditioning."""
        # Sent once, before the steps, which all read the same. The ids stay on the host, where a pass needs them.
        conditioning = conditioning.to(self.device)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            self.report(len(x))
            if self.bank is None:
                return self.adapter.velocity(x, sigma, conditioning)
            with self._slots(ids) as slots, self.bank.route(slots, ids):
                return self.adapter.velocity(x, sigma, conditioning)

        return velocity

    def _slots(self, ids: Tensor) -> AbstractContextManager[Slots]:
        return self.bank.placed(ids) if self.slots is None else nullcontext(self.slots)

    def _noise(self, seeds: list[int], draw: int = 0) -> Tensor:
        """Noise of each sample ``[B, T, C]``, in the latents' dtype on the device; ``draw`` counts those of a sample."""
        # Drawn in fp32 on the CPU, so that it is the same whatever the device and the dtype.
        generators = [torch.Generator().manual_seed(1000 * seed + draw) for seed in seeds]
        noises = [torch.randn(self.adapter.latent_shape, generator=generator) for generator in generators]
        return send(torch.stack(noises), self.device, self.adapter.latent_dtype)

    @torch.no_grad()
    def _batched(self, sample: Callable[[slice], Tensor], count: int) -> Tensor:
        return torch.cat([sample(slice(i, i + self.batch_size)).cpu() for i in range(0, count, self.batch_size)])
