"""Pictures before and after an effect, for a writer that sees: those that the user gave, else the teachers' renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from clora.config import DataConfig, DistillConfig, EffectConfig
from clora.errors import CloraError
from clora.images import list_images, load_image
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.common import to_pil
from clora.progress import stage
from clora.prompt_table import Pictures, PromptTable
from clora.rendering import Samples, num_passes, render_targets

Pairs = list[tuple[Image, Image]]
NUM_PAIRS = 2  # as in the paper


def given_pairs(effect: EffectConfig, size: tuple[int, int]) -> Pairs:
    """The first pairs of an effect's ``sources`` and ``targets``.

    Raises:
        CloraError: a picture without its result, or one that cannot be read.
    """
    results = {file.stem: file for file in list_images(effect.targets or "")}
    files = list_images(effect.sources or "")[:NUM_PAIRS]
    alone = [file.name for file in files if file.stem not in results]
    if alone:
        raise CloraError(
            f"effect {effect.name!r}: {effect.sources} and {effect.targets} must hold one image of each name, found no "
            f"result for {alone}"
        )
    pictures = [(load_image(file, size), load_image(results[file.stem], size)) for file in files]
    return [(to_pil(before), to_pil(after)) for before, after in pictures]


def rendered_pairs(
    config: DistillConfig,
    adapter: ModelAdapter,
    effects: Sequence[EffectConfig],
    teachers: Mapping[str, LoRAState],
) -> dict[str, Pairs]:
    """What the teachers of the effects make of their first sources, as they render targets.

    Raises:
        CloraError: a picture that cannot be read.
    """
    table, index = PromptTable(adapter), torch.arange(NUM_PAIRS)
    pictures = [_first_sources(effect, config.data, adapter) for effect in effects]
    samples = Samples(
        torch.stack([own.latents for own in pictures]),
        torch.stack([table.rows(effect.prompt, own, index) for effect, own in zip(effects, pictures, strict=True)]),
        torch.stack([table.rows("", own, index) for own in pictures]),
    )
    with stage("render examples", num_passes(config, samples.prompt.numel())) as advance:
        results = render_targets(adapter, teachers, samples, table.encode(), config, advance)
        return {
            effect.name: _to_pairs(own.pixels, adapter.decode(latents))
            for effect, own, latents in zip(effects, pictures, results, strict=True)
        }


def _first_sources(effect: EffectConfig, data: DataConfig, adapter: ModelAdapter) -> Pictures:
    """The first pictures that an effect's teacher edits; a single one is taken twice."""
    folder = effect.sources or data.sources
    files = list_images(folder)
    pixels = torch.stack([load_image(files[i % len(files)], data.size) for i in range(NUM_PAIRS)])
    return Pictures(folder, pixels, adapter.encode_sources([pixels])[0])


def _to_pairs(before: Tensor, after: Tensor) -> Pairs:
    return [(to_pil(a), to_pil(b)) for a, b in zip(before, after, strict=True)]
