"""The engine: teachers and encoded data in, one student LoRA out; and the same for the user's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clora.adapter_bank import AdapterBank, fresh_lora
from clora.config import DistillConfig, EffectConfig, dump_config, general_instructions
from clora.data import DistillData
from clora.errors import CloraError
from clora.lora.files import linear_shapes, load_lora
from clora.lora.merge import sum_svd
from clora.lora.state import LoRAModule, LoRAState
from clora.models import Conditioning, Flux2KleinAdapter, adapter_for, linear_names
from clora.trainer import CRITIC, STUDENT, DistillTrainer, Report


def train_student(
    config: DistillConfig,
    adapter: Flux2KleinAdapter,
    teachers: Mapping[str, LoRAState],
    data: DistillData,
    report: Report,
    checkpoint: Path | None = None,
) -> LoRAState:
    """Distils the teachers into one LoRA of rank ``config.student.rank``; the transformer is left as it was.

    Args:
        config: the settings.
        adapter: the model family.
        teachers: effect name to LoRA, in the order of ``data.effects``.
        data: encoded training data.
        report: called after every student update.
        checkpoint: where to resume from and to write to.

    Raises:
        CloraError: training diverged; names update, effect and term.
    """
    transformer = adapter.pipeline.transformer
    student = initial_student(config, transformer, list(teachers.values()))
    bank = AdapterBank(transformer, {STUDENT: student, CRITIC: student, **teachers})
    try:
        DistillTrainer(config, adapter, bank, data).fit(report, checkpoint)
        state = bank.state(STUDENT, config.student.rank)
    finally:
        bank.detach()
    return LoRAState({name: state.modules[name] for name in student.modules})


def initial_student(config: DistillConfig, transformer, teachers: list[LoRAState]) -> LoRAState:
    """The student before training: a zero delta, or the truncated mean of the teachers' deltas.

    Ranks that the mean leaves empty get a random ``lora_A``, else they would never learn.
    """
    shapes = linear_shapes(transformer)
    generator = torch.Generator().manual_seed(config.seed)
    targets = target_modules(transformer, config.student.targets)
    fresh = fresh_lora(shapes, config.student.rank, generator, targets)
    if config.student.init == "zero":
        return fresh
    merged = sum_svd(teachers, config.student.rank, [1 / len(teachers)] * len(teachers))
    return LoRAState({name: _fill(module, merged.modules.get(name)) for name, module in fresh.modules.items()})


def _fill(fresh: LoRAModule, merged: LoRAModule | None) -> LoRAModule:
    if merged is None:
        return fresh
    norms = merged.lora_A.norm(dim=1)  # square roots of the singular values; padded teachers give some that are 0
    alive = int((norms > 1e-5 * norms.max()).sum())
    a = torch.cat([merged.lora_A[:alive], fresh.lora_A[alive:]])
    b = torch.cat([merged.lora_B[:, :alive], fresh.lora_B[:, alive:]], dim=1)
    return LoRAModule(a, b)


def target_modules(transformer, suffixes: tuple[str, ...] | None) -> list[str]:
    """The linear layers of the blocks whose names end in one of ``suffixes``; all of them for None.

    Raises:
        CloraError: a suffix fits no layer.
    """
    names = linear_names(transformer)
    if suffixes is None:
        return names
    unused = [suffix for suffix in suffixes if not any(name.endswith(suffix) for name in names)]
    if unused:
        raise CloraError(
            f"student.targets: no linear layer of the blocks ends in {unused}; they are called {names[:6]}..."
        )
    return [name for name in names if name.endswith(tuple(suffixes))]


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
    from clora.generation import Generator

    num_effects, num_sources = sources.shape[:2]
    bank = AdapterBank(adapter.pipeline.transformer, teachers)
    try:
        generator = Generator(adapter, bank, bank.slots(), config.sampler.shift, batch_size, report)
        effect = torch.arange(num_effects).repeat_interleave(num_sources)
        seeds = [config.seed + i for i in range(len(effect))]
        conditioning = Conditioning(teacher_text[effect], sources.flatten(0, 1))
        latents = generator.guided_euler(
            effect, conditioning, empty_text, seeds, config.sampler.teacher_steps, config.sampler.guidance
        )
    finally:
        bank.detach()
    return latents.unflatten(0, (num_effects, num_sources))


def distill(config: DistillConfig) -> Path:
    """The whole job on the user's own pipeline, LoRA files and images; returns the collection's folder.

    Raises:
        CloraError: anything in the input that cannot be used; nothing is written then.
    """
    from clora.atomic import check_writable, write_atomic
    from clora.export import export_collection
    from clora.progress import stage

    output = check_writable(config.output)
    pipeline = load_pipeline(config.pipeline, config.device)
    adapter = adapter_for(pipeline, config.data.size, config.data.max_sequence_length)
    shapes = linear_shapes(pipeline.transformer)
    teachers = {effect.name: load_lora(effect.lora, shapes) for effect in config.effects}
    data = _encode(config, adapter, teachers)
    with stage("distil", config.train.updates) as advance:
        student = train_student(
            config,
            adapter,
            teachers,
            data,
            lambda update, values: advance(1, **values),
            output / "checkpoint" / "state.safetensors",
        )
    write_atomic(output / "clora.yaml", dump_config(config))
    return export_collection(student, _collection(config, pipeline), output, pipeline.transformer.dtype)


def load_pipeline(path: str, device: str):
    """A pipeline by folder or hub id, frozen, on the device (``auto``: cuda where there is one, else the CPU).

    Raises:
        CloraError: it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CloraError(f"pipeline {path!r} cannot be loaded: {error}") from error
    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline.to(target)


def _encode(config: DistillConfig, adapter: Flux2KleinAdapter, teachers: Mapping[str, LoRAState]) -> DistillData:
    from clora.images import load_images
    from clora.progress import stage

    size = config.data.size
    _, images = load_images(config.data.sources, size)
    if len(images) <= config.data.held_out:
        raise CloraError(
            f"data.held_out = {config.data.held_out} leaves none of the {len(images)} images in "
            f"{config.data.sources}; lower it or add images"
        )
    _check_pairs(config)
    shared = adapter.encode_images(images[: len(images) - config.data.held_out])
    sources = [_effect_images(effect.sources, shared, adapter, size) for effect in config.effects]
    count = min(config.data.sources_per_effect, *(len(s) for s in sources))
    stacked = torch.stack([s[:count] for s in sources])
    teacher_text = adapter.encode_prompts([effect.prompt for effect in config.effects])
    empty_text = adapter.encode_prompts([""])[0]
    passes = 2 * config.sampler.teacher_steps * len(config.effects) * count
    with stage("render targets", passes) as advance:
        rendered = render_targets(adapter, teachers, stacked, teacher_text, empty_text, config, advance)
    given = [_effect_images(effect.targets, None, adapter, size) for effect in config.effects]
    targets = torch.stack([r if g is None else g[:count] for r, g in zip(rendered, given, strict=True)])
    general = general_instructions(config.data) or ("",)
    return DistillData(
        effects=tuple(teachers),
        sources=stacked,
        targets=targets,
        teacher_text=teacher_text,
        student_text=encode_student_prompts(adapter, config.effects),
        general_sources=shared,
        general_text=adapter.encode_prompts(general),
        empty_text=empty_text,
    )


def _check_pairs(config: DistillConfig) -> None:
    """Given targets must go by the names of their sources, else images would be paired with others' results."""
    from clora.images import list_images

    for effect in config.effects:
        if effect.targets is None or effect.sources is None:
            continue
        names = [{file.stem for file in list_images(folder)} for folder in (effect.sources, effect.targets)]
        if names[0] != names[1]:
            raise CloraError(
                f"effect {effect.name!r}: {effect.sources} and {effect.targets} must hold images of the "
                f"same names, found only one of each pair for {sorted(names[0] ^ names[1])[:5]}"
            )


def _effect_images(folder: str | None, default: Tensor | None, adapter: Flux2KleinAdapter, size) -> Tensor | None:
    from clora.images import load_images

    return default if folder is None else adapter.encode_images(load_images(folder, size)[1])


def encode_student_prompts(adapter: Flux2KleinAdapter, effects: tuple[EffectConfig, ...]) -> Tensor:
    """Embeddings ``[E, P, L, D]`` of each effect's student prompts, repeated in turn up to the longest list."""
    most = max(len(effect.student_prompts) for effect in effects)
    prompts = [effect.student_prompts[i % len(effect.student_prompts)] for effect in effects for i in range(most)]
    return adapter.encode_prompts(prompts).unflatten(0, (len(effects), most))


def _collection(config: DistillConfig, pipeline):
    from clora import __version__
    from clora.export import CollectedEffect, Collection
    from clora.lora.source import content_hash

    effects = [
        CollectedEffect(effect.name, effect.student_prompts, Path(effect.lora).name, content_hash(effect.lora))
        for effect in config.effects
    ]
    return Collection(
        effects=effects,
        base_model=config.pipeline,
        pipeline_class=type(pipeline).__name__,
        steps=config.sampler.steps,
        shift=config.sampler.shift,
        max_sequence_length=config.data.max_sequence_length,
        size=config.data.size,
        provenance={"clora": __version__, "seed": config.seed, "config": dump_config(config)},
    )
