"""The data of a distillation: images and prompts encoded, targets rendered by the teachers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clora.adapter_bank import AdapterBank
from clora.config import DistillConfig, EffectConfig, general_instructions
from clora.data import DistillData, general_pair
from clora.errors import CloraError
from clora.generation import Generator
from clora.images import list_images, load_images
from clora.lora.state import LoRAState
from clora.models import Conditioning, Flux2KleinAdapter
from clora.progress import stage

FIRST_GENERAL_SEED = 500_000  # apart from the seeds of the teachers' renders


def encode_data(config: DistillConfig, adapter: Flux2KleinAdapter, teachers: Mapping[str, LoRAState]) -> DistillData:
    """Reads and encodes the images and prompts of a config, and renders the targets that were not given.

    Every image given with its result is used; of the others each teacher renders ``data.sources_per_effect``. Effects
    with fewer samples than others repeat theirs in turn.

    Raises:
        CloraError: images, pairs or prompts that cannot be used.
    """
    with stage("encode images and prompts", None):
        shared = adapter.encode_images(_shared_images(config))
        _check_pairs(config)
        sources = _sources(config, adapter, shared)
        teacher_text = adapter.encode_prompts([effect.prompt for effect in config.effects])
        student_text = encode_student_prompts(adapter, config.effects)
        empty_text = adapter.encode_prompts([""])[0]
        general_text = adapter.encode_prompts(general_instructions(config.data) or ("",))
    targets = _targets(config, adapter, teachers, sources, teacher_text, empty_text)
    count = max(len(images) for images in sources)
    return DistillData(
        effects=tuple(teachers),
        sources=torch.stack([_in_turn(images, count) for images in sources]),
        targets=torch.stack([_in_turn(images, count) for images in targets]),
        teacher_text=teacher_text,
        student_text=student_text,
        general_sources=shared,
        general_text=general_text,
        empty_text=empty_text,
        general_targets=_general_targets(config, adapter, shared, general_text, empty_text),
    )


def _shared_images(config: DistillConfig) -> Tensor:
    """The images that effects without their own and the general stream use."""
    _, images = load_images(config.data.sources, config.data.size)
    if len(images) <= config.data.held_out:
        raise CloraError(
            f"data.held_out = {config.data.held_out} leaves none of the {len(images)} images in "
            f"{config.data.sources}; lower it or add images"
        )
    return images[: len(images) - config.data.held_out]


def _sources(config: DistillConfig, adapter: Flux2KleinAdapter, shared: Tensor) -> list[Tensor]:
    """Each effect's sources ``[M, T, C]``; those of effects to be rendered have one M."""
    limit = config.data.sources_per_effect
    found = [
        shared if effect.sources is None else _encoded(effect.sources, config, adapter) for effect in config.effects
    ]
    rendered = [min(len(images), limit) for images, e in zip(found, config.effects, strict=True) if e.targets is None]
    return [
        images if effect.targets is not None else _in_turn(images[:limit], max(rendered))
        for images, effect in zip(found, config.effects, strict=True)
    ]


def _targets(
    config: DistillConfig,
    adapter: Flux2KleinAdapter,
    teachers: Mapping[str, LoRAState],
    sources: Sequence[Tensor],
    teacher_text: Tensor,
    empty_text: Tensor,
) -> list[Tensor]:
    """Each effect's targets ``[M, T, C]``: the images given with it, else its teacher's renders."""
    missing = [i for i, effect in enumerate(config.effects) if effect.targets is None]
    renders = iter(())
    if missing:
        chosen = {config.effects[i].name: teachers[config.effects[i].name] for i in missing}
        stacked = torch.stack([sources[i] for i in missing])
        with stage("render targets", 2 * config.sampler.teacher_steps * stacked[:, :, 0, 0].numel()) as advance:
            renders = iter(render_targets(adapter, chosen, stacked, teacher_text[missing], empty_text, config, advance))
    return [
        next(renders) if effect.targets is None else _encoded(effect.targets, config, adapter)
        for effect in config.effects
    ]


def _general_targets(
    config: DistillConfig, adapter, sources: Tensor, text: Tensor, empty_text: Tensor
) -> Tensor | None:
    count = config.data.general_targets
    if not count or not (config.objective.dual_stream and config.objective.trajectory_anchoring):
        return None
    with stage("render general targets", 2 * config.sampler.teacher_steps * count) as advance:
        return render_general_targets(adapter, sources, text, empty_text, config, advance)


def _check_pairs(config: DistillConfig) -> None:
    """Given targets must go by the names of their sources, else images would be paired with others' results."""
    for effect in config.effects:
        if effect.targets is None or effect.sources is None:
            continue
        names = [Counter(file.stem for file in list_images(folder)) for folder in (effect.sources, effect.targets)]
        if names[0] != names[1] or max(names[0].values()) > 1:
            odd = sorted(
                (names[0] - names[1]) + (names[1] - names[0]) + Counter(k for k in names[0] if names[0][k] > 1)
            )
            raise CloraError(
                f"effect {effect.name!r}: {effect.sources} and {effect.targets} must hold one image of each name, "
                f"found no pair for {odd[:5]}"
            )


def _encoded(folder: str, config: DistillConfig, adapter: Flux2KleinAdapter) -> Tensor:
    return adapter.encode_images(load_images(folder, config.data.size)[1])


def _in_turn(images: Tensor, count: int) -> Tensor:
    """The first ``count`` images; fewer are repeated in turn."""
    return images[torch.arange(count) % len(images)]


def encode_student_prompts(adapter: Flux2KleinAdapter, effects: tuple[EffectConfig, ...]) -> Tensor:
    """Embeddings ``[E, P, L, D]`` of each effect's student prompts, repeated in turn up to the longest list."""
    most = max(len(effect.student_prompts) for effect in effects)
    prompts = [effect.student_prompts[i % len(effect.student_prompts)] for effect in effects for i in range(most)]
    return adapter.encode_prompts(prompts).unflatten(0, (len(effects), most))


def render_targets(
    adapter: Flux2KleinAdapter,
    teachers: Mapping[str, LoRAState],
    sources: Tensor,
    teacher_text: Tensor,
    empty_text: Tensor,
    config: DistillConfig,
    report,
    batch_size: int = 16,
) -> Tensor:
    """What every teacher makes of its own sources (the paper's y): guided Euler sampling with its own prompt.

    Args:
        adapter: the model family.
        teachers: effect name to LoRA, E of them.
        sources: ``[E, M, T, C]``.
        teacher_text: ``[E, L, D]``.
        empty_text: ``[L, D]``.
        config: sampler settings and seed.
        report: called as ``report(passes)``.
        batch_size: samples per batch (two rows each).

    Returns:
        ``[E, M, T, C]``.
    """
    num_effects, num_sources = sources.shape[:2]
    bank = AdapterBank(adapter.pipeline.transformer, teachers)
    try:
        generator = Generator(adapter, bank, bank.slots(), config.sampler.shift, batch_size, report)
        effect = torch.arange(num_effects).repeat_interleave(num_sources)
        seeds = [config.seed + i for i in range(len(effect))]
        conditioning = Conditioning(teacher_text[effect], sources.flatten(0, 1))
        latents = generator.guided_euler(
            effect,
            conditioning,
            empty_text,
            seeds,
            config.sampler.teacher_steps,
            config.sampler.guidance,
            config.objective.norm_rescale,
        )
    finally:
        bank.detach()
    return latents.unflatten(0, (num_effects, num_sources))


def render_general_targets(
    adapter: Flux2KleinAdapter, sources: Tensor, text: Tensor, empty_text: Tensor, config: DistillConfig, report
) -> Tensor:
    """What the base makes of ``data.general_targets`` general pairs (`DistillData.general_targets`), as teachers do.

    Returns:
        ``[P, T, C]``.
    """
    pairs = torch.arange(config.data.general_targets)
    source, instruction = general_pair(pairs, len(sources), len(text))
    conditioning = Conditioning(text[instruction], sources[source])
    return Generator(adapter, None, None, config.sampler.shift, report=report).guided_euler(
        pairs,
        conditioning,
        empty_text,
        [config.seed + FIRST_GENERAL_SEED + p for p in pairs.tolist()],
        config.sampler.teacher_steps,
        config.sampler.guidance,
        config.objective.norm_rescale,
    )
