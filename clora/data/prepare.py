"""The data of a distillation: images and prompts encoded, targets rendered by the teachers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clora.config.settings import DistillConfig, EffectConfig, general_instructions
from clora.data.batches import DistillData, general_pair
from clora.data.cache import Cache
from clora.data.encoders import Encoders, Pictures, PromptTable, pixel_digests
from clora.data.images import list_images, load_images
from clora.data.rendering import CachedTargets, Samples
from clora.devices import move
from clora.errors import CloraError, about
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.progress import stage

MAX_PAIRS = 512  # general pairs, where each needs its own encoding and no general targets say how many
NO_CACHE = Cache(None)

Read = Callable[[str, int | None], Tensor]
"""Reads the first images of a folder ``[N, 3, H, W]``, all of them for None."""


@dataclass(frozen=True)
class EffectRows:
    """The samples of one effect: rows of its pictures and of the prompt table.

    Attributes:
        pictures: its images to edit.
        used: ``[M]`` of them.
        teacher, empty: ``[M]``.
        student: ``[P, M]``.
    """

    pictures: Pictures
    used: Tensor
    teacher: Tensor
    student: Tensor
    empty: Tensor


def encode_data(
    config: DistillConfig,
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    cache: Cache = NO_CACHE,
    device: torch.device | None = None,
) -> DistillData:
    """Reads and encodes the images and prompts of a config, and renders the targets that were not given.

    Every image given with its result is used; of the others each teacher renders ``data.sources_per_effect``. Effects
    with fewer samples than others repeat theirs in turn.

    Args:
        config: the settings.
        adapter: the model family.
        teachers: effect name to LoRA.
        cache: what other runs, or this one before it was stopped, have encoded and rendered.
        device: where the encoders go while they are needed, and then, to stay, the transformer; None leaves them.

    Raises:
        CloraError: images, pairs or prompts that cannot be used.
    """

    def read(folder: str, limit: int | None) -> Tensor:
        return load_images(folder, config.data.size, limit)[1]

    with stage("encode images and prompts", None), Encoders(adapter, cache, device) as encoders:
        check_pairs(config)
        shared, effects, pairs, table = _rows(config, adapter.text_sees_image, read)
        text = table.encode(encoders)
        pictures = {p.name: p.pixels for p in (shared, *(effect.pictures for effect in effects))}
        latents = {name: encoders.sources(pixels) for name, pixels in pictures.items()}
        sources = [latents[effect.pictures.name][effect.used] for effect in effects]
        given = [_given_targets(effect, config, encoders) for effect in config.effects]
    if device is not None:
        move(adapter.pipeline.transformer, device)
    renders = CachedTargets(config, adapter, table, text, cache, encoders.components)
    targets = _targets(renders, teachers, effects, sources, given)
    count = max(len(images) for images in targets)
    return DistillData(
        effects=tuple(teachers),
        text=text,
        sources=torch.stack([_in_turn(images, count) for images in sources]),
        targets=torch.stack([_in_turn(images, count) for images in targets]),
        teacher_text=torch.stack([_in_turn(effect.teacher, count) for effect in effects]),
        student_text=torch.stack([_in_turn(effect.student.T, count).T for effect in effects]),
        empty_text=torch.stack([_in_turn(effect.empty, count) for effect in effects]),
        general_sources=latents[shared.name],
        general_pairs=pairs,
        general_targets=_general_targets(renders, shared, latents[shared.name], pairs),
    )


class DataCount(NamedTuple):
    """Sizes of the data of a distillation: images to edit, rows of the prompt table, and targets to be rendered."""

    sources: int
    prompts: int
    renders: int


def count_data(config: DistillConfig, text_sees_image: bool) -> DataCount:
    """Counts what `encode_data` encodes and renders; no image is read.

    Args:
        config: the settings.
        text_sees_image: `ModelAdapter.text_sees_image`.

    Raises:
        CloraError: a folder of images or a file of instructions cannot be read.
    """

    def read(folder: str, limit: int | None) -> Tensor:
        return torch.empty(len(list_images(folder)[:limit]), 0)  # images without pixels

    shared, effects, pairs, table = _rows(config, text_sees_image, read)
    own = [rows.pictures for rows in effects if rows.pictures is not shared]
    rendered = [len(rows.used) for rows, effect in zip(effects, config.effects, strict=True) if effect.targets is None]
    return DataCount(
        sources=sum(len(pictures.pixels) for pictures in (shared, *own)),
        prompts=len(table),
        renders=sum(rendered) + (len(pairs) if renders_general(config) else 0),
    )


def renders_general(config: DistillConfig) -> bool:
    """Whether the base renders targets of the general stream."""
    objective = config.objective
    return bool(config.data.general_targets) and objective.dual_stream and objective.trajectory_anchoring


def _rows(
    config: DistillConfig, text_sees_image: bool, read: Read
) -> tuple[Pictures, list[EffectRows], Tensor, PromptTable]:
    """The shared images, each effect's rows, the general pairs, and the table of all their prompts."""
    shared = Pictures("", read(config.data.sources, num_shared(config)))  # no effect can have this name
    table = PromptTable(text_sees_image)
    effects = _effect_rows(config, shared, table, read)
    return shared, effects, _general_pairs(config, text_sees_image, shared, table), table


def num_shared(config: DistillConfig) -> int:
    """How many images of ``data.sources`` are trained on. Raises CloraError where none is left."""
    with about("data.sources"):
        count = len(list_images(config.data.sources))
    if count <= config.data.held_out:
        raise CloraError(
            f"data.held_out = {config.data.held_out} leaves none of the {count} images in "
            f"{config.data.sources}; lower it or add images"
        )
    return count - config.data.held_out


def _effect_rows(config: DistillConfig, shared: Pictures, table: PromptTable, read: Read) -> list[EffectRows]:
    """Reads every effect's own images and asks the table for its prompts."""
    effects, limit = config.effects, config.data.sources_per_effect
    pictures = [_own_pictures(effect, config, read) or shared for effect in effects]
    counts = [
        len(p.pixels) if effect.targets is not None else min(len(p.pixels), limit)
        for p, effect in zip(pictures, effects, strict=True)
    ]
    rendered = max((n for n, effect in zip(counts, effects, strict=True) if effect.targets is None), default=0)
    phrasings = max(len(effect.student_prompts) for effect in effects)

    def rows(effect: EffectConfig, own: Pictures, count: int) -> EffectRows:
        used = _in_turn(torch.arange(count), count if effect.targets is not None else rendered)
        prompts = [effect.student_prompts[i % len(effect.student_prompts)] for i in range(phrasings)]
        return EffectRows(
            pictures=own,
            used=used,
            teacher=table.rows(effect.prompt, own, used),
            student=torch.stack([table.rows(prompt, own, used) for prompt in prompts]),
            empty=table.rows("", own, used),
        )

    return [rows(*parts) for parts in zip(effects, pictures, counts, strict=True)]


def _own_pictures(effect: EffectConfig, config: DistillConfig, read: Read) -> Pictures | None:
    """An effect's pictures, no more than its teacher renders where no results are given with them."""
    if effect.sources is None:
        return None
    limit = config.data.sources_per_effect if effect.targets is None else None
    return Pictures(effect.name, read(effect.sources, limit))


def _given_targets(effect: EffectConfig, config: DistillConfig, encoders: Encoders) -> Tensor | None:
    return None if effect.targets is None else encoders.results(load_images(effect.targets, config.data.size)[1])


def _general_pairs(config: DistillConfig, text_sees_image: bool, shared: Pictures, table: PromptTable) -> Tensor:
    """`DistillData.general_pairs`: as many as are to be rendered, else every picture with every instruction."""
    if not config.objective.dual_stream:
        return torch.empty(0, 3, dtype=torch.int64)
    instructions, num_sources = general_instructions(config.data), len(shared.pixels)
    every = num_sources * len(instructions)
    count = config.data.general_targets or (min(every, MAX_PAIRS) if text_sees_image else every)
    source, instruction = general_pair(torch.arange(count), num_sources, len(instructions))
    prompt = [table.rows(instructions[i], shared, s[None]) for i, s in zip(instruction.tolist(), source, strict=True)]
    return torch.stack([source, torch.cat(prompt), table.rows("", shared, source)], dim=1)


def _targets(
    renders: CachedTargets,
    teachers: Mapping[str, LoRAState],
    effects: Sequence[EffectRows],
    sources: Sequence[Tensor],
    given: Sequence[Tensor | None],
) -> list[Tensor]:
    """Each effect's targets ``[M, T, C]``: the images given with it, else its teacher's renders."""
    missing = [i for i, targets in enumerate(given) if targets is None]
    if not missing:
        return list(given)
    chosen = [effects[i] for i in missing]
    samples = Samples(
        torch.stack([sources[i] for i in missing]),
        torch.stack([effect.teacher for effect in chosen]),
        torch.stack([effect.empty for effect in chosen]),
    )
    images = [image for effect in chosen for image in pixel_digests(effect.pictures.pixels[effect.used])]
    names = list(teachers)
    rendered = iter(renders.of_teachers({names[i]: teachers[names[i]] for i in missing}, samples, images))
    return [next(rendered) if targets is None else targets for targets in given]


def _general_targets(renders: CachedTargets, shared: Pictures, latents: Tensor, pairs: Tensor) -> Tensor | None:
    if not renders_general(renders.config):
        return None
    source, prompt, empty = pairs.unbind(1)
    return renders.of_base(Samples(latents[source], prompt, empty), pixel_digests(shared.pixels[source]))


def check_pairs(config: DistillConfig) -> None:
    """Given targets must go by the names of their sources, else images would be paired with others' results."""
    for i, effect in enumerate(config.effects):
        if effect.targets is None or effect.sources is None:
            continue
        names = [_stems(effect.sources, f"effects.{i}.sources"), _stems(effect.targets, f"effects.{i}.targets")]
        if names[0] != names[1] or max(names[0].values()) > 1:
            odd = sorted(
                (names[0] - names[1]) + (names[1] - names[0]) + Counter(k for k in names[0] if names[0][k] > 1)
            )
            raise CloraError(
                f"effect {effect.name!r}: {effect.sources} and {effect.targets} must hold one image of each name, "
                f"found no pair for {odd[:5]}"
            )


def _stems(folder: str, setting: str) -> Counter[str]:
    with about(setting):
        return Counter(file.stem for file in list_images(folder))


def _in_turn(rows: Tensor, count: int) -> Tensor:
    """The first ``count`` rows; fewer are repeated in turn."""
    return rows[torch.arange(count) % len(rows)]
