"""Pictures before and after an effect, for a writer that sees: the user's own, else the teachers' renders."""

from __future__ import annotations

import torch
from PIL.Image import Image
from torch import Tensor

from clora.config.settings import DistillConfig, EffectConfig
from clora.data.generation import Report
from clora.data.images import list_images, load_image, load_images
from clora.data.rendering import Samples, render_targets
from clora.errors import about
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.common import to_pil

Pairs = list[tuple[Image, Image]]
NUM_PAIRS = 2  # as in the paper


def given_pairs(effect: EffectConfig, size: tuple[int, int]) -> Pairs:
    """Reads the first pairs of an effect's ``sources`` and ``targets``, whose names are the same (`check_pairs`).

    Raises:
        CloraError: a picture that cannot be read.
    """
    before = load_images(effect.sources or "", size, NUM_PAIRS)
    after = load_images(effect.targets or "", size, NUM_PAIRS)
    return _to_pairs(before, after)


def rendered_pairs(
    config: DistillConfig, adapter: ModelAdapter, effect: EffectConfig, teacher: LoRAState, report: Report
) -> Pairs:
    """Renders an effect's first sources by its teacher, as targets are rendered.

    Args:
        config: sampler settings, the guidance filled in, and seed.
        adapter: the model family, its transformer where it is to render.
        effect: the effect.
        teacher: its LoRA.
        report: called as ``report(passes)``.

    Raises:
        CloraError: a picture that cannot be read.
    """
    with about("data.sources" if effect.sources is None else f"effect {effect.name!r}: sources"):
        files = list_images(effect.sources or config.data.sources)
        # A single picture is taken twice: [NUM_PAIRS, 3, H, W].
        pixels = torch.stack([load_image(files[i % len(files)], config.data.size) for i in range(NUM_PAIRS)])
    # Families that encode prompts with a picture get each prompt with its own.
    shown = [torch.cat([pixels, pixels])] if adapter.text_sees_image else None
    text = adapter.encode_prompts([effect.prompt] * NUM_PAIRS + [""] * NUM_PAIRS, shown)
    # Rows of the prompts, then of the empty prompts, [1, NUM_PAIRS] each.
    rows = torch.arange(2 * NUM_PAIRS).view(2, 1, NUM_PAIRS)
    samples = Samples.of_teachers(adapter.encode_sources([pixels])[0][None], *rows, config.seed)
    latents = torch.stack(list(render_targets(adapter, {effect.name: teacher}, samples, text, config, report)))
    return _to_pairs(pixels, adapter.decode(latents))


def _to_pairs(before: Tensor, after: Tensor) -> Pairs:
    """Pairs of pictures from two batches ``[N, 3, H, W]``."""
    return [(to_pil(picture), to_pil(result)) for picture, result in zip(before, after, strict=True)]
