"""Pictures to watch a training by: what the student makes of fixed pictures and noise, for every effect, again and again."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.slots import Slots
from clora.config.settings import DistillConfig
from clora.data.batches import DistillData
from clora.data.generation import Generator
from clora.data.rendering import TEACHERS_AT_ONCE, samples_at_once
from clora.devices import on_device
from clora.files import write_atomic
from clora.models import ModelAdapter
from clora.models.common import to_pil
from clora.models.conditioning import Conditioning
from clora.report.previews import INDEX, Preview, picture_file, read_previews

LARGEST_SHARE = 0.02
"""Of a run's time, where ``train.preview_every`` is auto."""
CELL = 256
"""Most pixels of a picture's longer side."""
QUALITY = 85


class Previews:
    """Draws previews of a run and keeps them as files.

    Args:
        config: the settings.
        adapter: the model family; its transformer carries the bank.
        data: with `DistillData.previews`.
        folder: for the pictures; what the run before has left there after ``update`` is removed.
        device: where the autoencoder runs.
        update: where the run begins.
    """

    def __init__(
        self,
        config: DistillConfig,
        adapter: ModelAdapter,
        data: DistillData,
        folder: Path,
        device: torch.device,
        update: int = 0,
    ):
        assert data.previews is not None
        self.config = config
        self.adapter = adapter
        self.folder = folder
        self.device = device
        self.effects = data.effects
        self._conditioning = Conditioning(data.text[data.previews.student_text], data.previews.sources[:])
        self._seconds = 0.0
        self._ended = -float("inf")
        self._kept = [preview for preview in read_previews(folder) if preview.update <= update and update > 0]
        if not self._kept:
            shutil.rmtree(folder, ignore_errors=True)
        self._targets = self._decode(data.previews.targets[:])
        for effect, source, target in zip(self.effects, data.previews.pictures, self._targets, strict=True):
            self._write(effect, "source", _pixels(source))
            self._write(effect, "target", target)

    def is_due(self, update: int) -> bool:
        """Decides whether previews are drawn after an update."""
        every = self.config.train.preview_every
        if every != "auto":
            return update % every == 0
        # So long after the last ones that these take no more than their share of the time.
        return time.monotonic() - self._ended >= self._seconds / LARGEST_SHARE

    @torch.no_grad()
    def draw(self, bank: AdapterBank, student: Slots, update: int) -> None:
        """Draws what the student makes now, beside `update` of an index with the PSNR of each effect against its target."""
        start = time.monotonic()
        steps, shift = self.config.sampler.steps, self.config.sampler.shift
        generator = Generator(self.adapter, bank, samples_at_once(self.config, TEACHERS_AT_ONCE), slots=student)
        ids = torch.zeros(len(self.effects), dtype=torch.int64)
        results = generator.few_step(ids, self._conditioning, [self.config.seed] * len(ids), steps, shift)
        psnr = {}
        for effect, target, result in zip(self.effects, self._targets, self._decode(results), strict=True):
            self._write(effect, update, result)
            psnr[effect] = _psnr(result, target)
        self._kept = [preview for preview in self._kept if preview.update < update] + [Preview(update, psnr)]
        write_atomic(self.folder / INDEX, json.dumps([preview._asdict() for preview in self._kept]) + "\n")
        self._ended = time.monotonic()
        self._seconds = self._ended - start

    def _decode(self, latents: Tensor) -> list[np.ndarray]:
        """Decodes latents ``[E, T, C]`` one at a time: an autoencoder needs much memory for a large image."""
        with on_device(self.adapter.pipeline.vae, self.device):
            return [_pixels(self.adapter.decode(row[None])[0]) for row in latents]

    def _write(self, effect: str, name: str | int, pixels: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="WEBP", quality=QUALITY)
        write_atomic(self.folder / picture_file(self.effects.index(effect), effect, name), buffer.getvalue())


def _pixels(image: Tensor) -> np.ndarray:
    """Scales an image ``[3, H, W]`` in [-1, 1] down to uint8 ``[h, w, 3]`` of `CELL` pixels at most."""
    picture = to_pil(image)
    picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """PSNR in dB of uint8 pictures, 100 at most."""
    error = np.mean((found.astype(float) - expected) ** 2) / 255**2
    return float(min(100.0, -10 * np.log10(max(error, 1e-10))))
