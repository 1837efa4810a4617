"""Pictures before and after an effect, for a writer that sees: the user's own, else the teachers' renders."""

from __future__ import annotations

import torch
from PIL.Image import Image

from clora.config.settings import DistillConfig, EffectConfig
from clora.data.generation import Report
from clora.data.images import list_images, load_image
from clora.data.rendering import Samples, render_targets
from clora.errors import CloraError, about
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.common import to_pil

Pairs = list[tuple[Image, Image]]
NUM_PAIRS = 2  # as in the paper


def given_pairs(effect: EffectConfig, size: tuple[int, int]) -> Pairs:
    """Reads the first pairs of an effect's ``sources`` and ``targets``.

    Raises:
        CloraError: a picture without its result, or one that cannot be read.
    """
    with about(f"effect {effect.name!r}: targets"):
        results = {file.stem: file for file in list_images(effect.targets or "")}
    with about(f"effect {effect.name!r}: sources"):
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
    shown = [torch.cat([pixels, pixels])] if adapter.text_sees_image else None
    text = adapter.encode_prompts([effect.prompt] * NUM_PAIRS + [""] * NUM_PAIRS, shown)
    # Rows of the prompts, then of the empty prompts, [1, NUM_PAIRS] each.
    rows = torch.arange(2 * NUM_PAIRS).view(2, 1, NUM_PAIRS)
    samples = Samples.of_teachers(adapter.encode_sources([pixels])[0][None], *rows, config.seed)
    latents = torch.stack(list(render_targets(adapter, {effect.name: teacher}, samples, text, config, report)))
    results = adapter.decode(latents)
    return [(to_pil(before), to_pil(after)) for before, after in zip(pixels, results, strict=True)]
