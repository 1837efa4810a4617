"""The data of a distillation: images and prompts encoded, targets rendered by the teachers.

`encode_data` is the entry. It reads the images (`images`), collects and encodes the prompts (`encoders`), and renders
the targets that are not given (`rendering`). All of it is behind one cache (`cache`). The result is what batches are
drawn from (`batches`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clora.config.settings import DistillConfig, general_instructions
from clora.data.batches import DistillData, EffectSamples, Previews, general_pair
from clora.data.cache import Cache
from clora.data.encoders import Encoders, Pictures, PromptTable
from clora.data.images import ImageFolder, list_images
from clora.data.rendering import CachedTargets, Samples
from clora.data.tables import Latents, LatentTable, select, stack
from clora.devices import move
from clora.errors import CloraError, about
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.progress import say, stage

MAX_PAIRS = 512  # general pairs, where each needs its own encoding and no general targets limit them
NO_CACHE = Cache(None)
HELD_OUT = " "
"""Name of the set of pictures that are held out; no effect has a blank one."""
PREVIEW_PICTURES = 4

Read = Callable[[str, slice], Tensor | ImageFolder]
"""Finds some images of a folder: ``[N, 3, H, W]``."""


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
        cache: encodings and renders of other runs, or of this one before it was stopped.
        device: where the encoders go while they are needed, and then, to stay, the transformer; None leaves them.

    Raises:
        CloraError: images, pairs or prompts that cannot be used.
    """

    def read(folder: str, chosen: slice) -> ImageFolder:
        return ImageFolder(folder, config.data.size, chosen)

    if note := pairs_note(config, adapter.text_sees_image):
        say(note)
    with stage("encode images and prompts", None), Encoders(adapter, cache, device) as encoders:
        check_pairs(config)
        shared, effects, pairs, previewed, table = _rows(config, adapter.text_sees_image, read)
        text = table.encode(encoders)
        # Images that several effects use are encoded once, under the name of their set.
        latents = {shared.name: encoders.sources(shared, config.data.sources)}
        for name, effect in [*effects.items(), *previewed.items()]:
            if effect.pictures.name not in latents:
                latents[effect.pictures.name] = encoders.sources(effect.pictures, _folder(config, name))
        sources = {name: select(latents[effect.pictures.name], effect.used) for name, effect in effects.items()}
        # Given results are encoded as they are; what is missing here is rendered below.
        targets: dict[str, Latents] = {}
        for effect in config.effects:
            if effect.targets is not None:
                results = Pictures(effect.name, read(effect.targets, slice(None)))
                targets[effect.name] = encoders.results(results, effect.targets)
    # The encoders have left the device: the transformer takes their place, first to render, then to train.
    if device is not None:
        move(adapter.pipeline.transformer, device)
    renders = CachedTargets(config, adapter, table, text, cache, encoders.components)
    rendering = {name: lora for name, lora in teachers.items() if name not in targets}
    if rendering:
        targets |= _rendered("render targets", renders, rendering, effects, sources)
    samples = [
        EffectSamples(name, sources[name], targets[name], effect.teacher, effect.student, effect.empty)
        for name, effect in effects.items()
    ]
    general = latents[shared.name]
    general_targets = _general_targets(renders, shared, general, pairs)
    previews = _previews(renders, teachers, previewed, latents) if previewed else None
    return DistillData.of(text, samples, general, pairs, general_targets, previews)


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

    def read(folder: str, chosen: slice) -> Tensor:
        return torch.empty(len(list_images(folder)[chosen]), 0)  # images without pixels

    shared, effects, pairs, previewed, table = _rows(config, text_sees_image, read)
    own = [effect.pictures for effect in effects.values() if effect.pictures is not shared]
    own += [effect.pictures for effect in [*previewed.values()][:1] if effect.pictures is not shared]
    rendered = [len(effects[effect.name].used) for effect in config.effects if effect.targets is None]
    return DataCount(
        sources=sum(len(pictures.pixels) for pictures in (shared, *own)),
        prompts=len(table.prompts),
        renders=sum(rendered) + len(previewed) + (len(pairs) if renders_general(config) else 0),
    )


def pairs_note(config: DistillConfig, text_sees_image: bool) -> str | None:
    """States that the general stream has fewer pairs than there could be; None where it has all, or a stated number."""
    data = config.data
    if not (config.objective.dual_stream and text_sees_image) or data.general_targets or data.general_pairs:
        return None
    every = num_shared(config) * len(general_instructions(data))
    if every <= MAX_PAIRS:
        return None
    return (
        f"the general stream has {MAX_PAIRS} of {every} pairs of picture and instruction, since each is an encoding of its "
        "own for this model; data.general_pairs sets another number"
    )


def renders_general(config: DistillConfig) -> bool:
    """True if the base renders targets of the general stream."""
    objective = config.objective
    return bool(config.data.general_targets) and objective.dual_stream and objective.trajectory_anchoring


def _rows(
    config: DistillConfig, text_sees_image: bool, read: Read
) -> tuple[Pictures, dict[str, EffectRows], Tensor, dict[str, EffectRows], PromptTable]:
    """The shared images, each effect's rows, the general pairs, the rows of previews, and the table of all their prompts."""
    # Effects without images of their own and the general stream share these; no effect can have the name "".
    shared = Pictures("", read(config.data.sources, slice(num_shared(config))))
    table = PromptTable(text_sees_image)
    effects = _effect_rows(config, shared, table, read)
    pairs = _general_pairs(config, shared, table)
    return shared, effects, pairs, _previewed(config, shared, table, read), table


def _previewed(config: DistillConfig, shared: Pictures, table: PromptTable, read: Read) -> dict[str, EffectRows]:
    """One row for each effect: a held-out picture, else one that is trained on; none where previews are switched off."""
    if config.train.preview_every == 0:
        return {}
    pictures = shared
    if config.data.held_out:
        first = num_shared(config)
        pictures = Pictures(HELD_OUT, read(config.data.sources, slice(first, first + PREVIEW_PICTURES)))
    count = min(len(pictures.pixels), PREVIEW_PICTURES)
    rows = {}
    for i, effect in enumerate(config.effects):
        used = torch.tensor([i % count])
        prompts = effect.prompt, effect.student_prompts[0], ""
        teacher, student, empty = (table.rows(prompt, pictures, used) for prompt in prompts)
        rows[effect.name] = EffectRows(pictures, used, teacher, student[None], empty)
    return rows


def num_shared(config: DistillConfig) -> int:
    """The number of images of ``data.sources`` that are trained on. Raises CloraError where none is left."""
    with about("data.sources"):
        count = len(list_images(config.data.sources))
    if count <= config.data.held_out:
        raise CloraError(
            f"data.held_out = {config.data.held_out} leaves none of the {count} images in "
            f"{config.data.sources}; lower it or add images"
        )
    return count - config.data.held_out


def _effect_rows(config: DistillConfig, shared: Pictures, table: PromptTable, read: Read) -> dict[str, EffectRows]:
    """Reads every effect's own images and enters its prompts into the table."""
    pictures, counts = [], []
    for effect in config.effects:
        # Given pairs are all used; a teacher renders no more than ``sources_per_effect``.
        limit = config.data.sources_per_effect if effect.targets is None else None
        own = shared if effect.sources is None else Pictures(effect.name, read(effect.sources, slice(limit)))
        pictures.append(own)
        counts.append(min(len(own.pixels), limit or len(own.pixels)))
    # Every teacher renders as many as the one with the most sources: fewer are rendered again with other seeds.
    rendered = [count for count, effect in zip(counts, config.effects, strict=True) if effect.targets is None]
    rows = {}
    for effect, own, count in zip(config.effects, pictures, counts, strict=True):
        # [M] pictures in turn, beside each the effect's prompts: what is encoded with an image has a row for each.
        used = torch.arange(max(rendered) if effect.targets is None else count) % count
        rows[effect.name] = EffectRows(
            pictures=own,
            used=used,
            teacher=table.rows(effect.prompt, own, used),
            student=torch.stack([table.rows(prompt, own, used) for prompt in effect.student_prompts]),
            empty=table.rows("", own, used),
        )
    return rows


def _general_pairs(config: DistillConfig, shared: Pictures, table: PromptTable) -> Tensor:
    """`DistillData.general_pairs`: as many as are to be rendered, else every picture with every instruction."""
    if not config.objective.dual_stream:
        return torch.empty(0, 3, dtype=torch.int64)
    instructions = general_instructions(config.data)
    num_sources = len(shared.pixels)
    every = num_sources * len(instructions)
    # Where a prompt is encoded with its image, every pair is an encoding of its own, so that their number is bounded.
    most = config.data.general_pairs or (MAX_PAIRS if table.text_sees_image else every)
    count = config.data.general_targets or min(every, most)
    source, instruction = general_pair(torch.arange(count), num_sources, len(instructions))
    if not table.text_sees_image:
        # A row for each instruction, in the order in which pairs have them: of 20 000 pictures there are millions of pairs.
        rows = torch.zeros(len(instructions), dtype=torch.int64)
        for i in dict.fromkeys(instruction.tolist()):
            rows[i] = table.rows(instructions[i], shared, source[:1])[0]
        return torch.stack([source, rows[instruction], table.rows("", shared, source[:1]).expand(count)], dim=1)
    prompt = [table.rows(instructions[i], shared, s[None]) for i, s in zip(instruction.tolist(), source, strict=True)]
    return torch.stack([source, torch.cat(prompt), table.rows("", shared, source)], dim=1)


def _previews(
    renders: CachedTargets,
    teachers: Mapping[str, LoRAState],
    rows: Mapping[str, EffectRows],
    latents: Mapping[str, Latents],
) -> Previews:
    """Renders what the teachers make of the pictures of previews."""
    sources = {name: select(latents[row.pictures.name], row.used) for name, row in rows.items()}
    targets = _rendered("render previews", renders, teachers, rows, sources)
    return Previews(
        [row.pictures.pixels[int(row.used)] for row in rows.values()],
        stack(list(sources.values())).flatten(0, 1),
        stack(list(targets.values())).flatten(0, 1),
        torch.cat([row.student[0] for row in rows.values()]),
    )


def _rendered(
    title: str,
    renders: CachedTargets,
    teachers: Mapping[str, LoRAState],
    effects: Mapping[str, EffectRows],
    sources: Mapping[str, Latents],
) -> dict[str, Latents]:
    """Renders the targets ``[M, T, C]`` of these teachers, each of its effect's sources."""
    chosen = [effects[name] for name in teachers]
    samples = Samples.of_teachers(
        stack([sources[name] for name in teachers]),
        torch.stack([effect.teacher for effect in chosen]),
        torch.stack([effect.empty for effect in chosen]),
        renders.config.seed,
    )
    images, names = [], []
    for name, effect in zip(teachers, chosen, strict=True):
        images += [effect.pictures.digests[i] for i in effect.used.tolist()]
        names += [f"picture {i + 1} of {_folder(renders.config, name)}" for i in effect.used.tolist()]
    # The renders come teacher by teacher: [E M, T, C], cut into one [M, T, C] for each.
    latents = renders.render(title, teachers, samples, images, names)
    rows = torch.arange(len(latents)).view(len(teachers), -1)
    return {name: select(latents, own) for name, own in zip(teachers, rows, strict=True)}


def _general_targets(
    renders: CachedTargets, shared: Pictures, latents: LatentTable, pairs: Tensor
) -> LatentTable | None:
    """The base's renders ``[Q, T, C]`` of the general pairs, where the config asks for them."""
    config = renders.config
    if not renders_general(config):
        return None
    source, prompt, empty = pairs.unbind(1)
    samples = Samples.of_base(select(latents, source), prompt, empty, config.seed)
    names = [f"picture {i + 1} of {config.data.sources}" for i in source.tolist()]
    images = [shared.digests[i] for i in source.tolist()]
    return renders.render("render general targets", {}, samples, images, names)


def _folder(config: DistillConfig, effect: str) -> str:
    """The folder of an effect's images to edit."""
    own = next(e.sources for e in config.effects if e.name == effect)
    return own or config.data.sources


def check_pairs(config: DistillConfig) -> None:
    """Refuses given targets whose names are not those of their sources: images would be paired with others' results."""
    for i, effect in enumerate(config.effects):
        if effect.targets is None or effect.sources is None:
            continue
        sources = _stems(effect.sources, f"effects.{i}.sources")
        targets = _stems(effect.targets, f"effects.{i}.targets")
        twice = Counter(stem for stem, count in sources.items() if count > 1)
        odd = (sources - targets) + (targets - sources) + twice
        if odd:
            raise CloraError(
                f"effect {effect.name!r}: {effect.sources} and {effect.targets} must hold one image of each name, "
                f"found no pair for {sorted(odd)[:5]}"
            )


def _stems(folder: str, setting: str) -> Counter[str]:
    with about(setting):
        return Counter(file.stem for file in list_images(folder))
