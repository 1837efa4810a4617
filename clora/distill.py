"""The engine: teachers and encoded data in, one student LoRA out; and the same for the user's own files."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from clora.adapter_bank import AdapterBank, fresh_lora
from clora.config import (
    DEVICE_NAMES,
    DEVICES,
    DistillConfig,
    EffectConfig,
    TrainConfig,
    dump_config,
    general_instructions,
)
from clora.data import DistillData, general_pair
from clora.errors import CloraError
from clora.flow_matching import student_schedule
from clora.lora.files import linear_shapes, load_lora
from clora.lora.merge import sum_svd
from clora.lora.state import LoRAModule, LoRAState
from clora.models import Conditioning, Flux2KleinAdapter, adapter_for, linear_names
from clora.objective import TAU_BOUNDS, target_simulation_steps
from clora.progress import stage, up_to
from clora.trainer import CRITIC, STUDENT, DistillTrainer, Report

FIRST_GENERAL_SEED = 500_000  # apart from the seeds of the teachers' renders


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
    from clora.generation import Generator

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


def distill(config: DistillConfig) -> Path:
    """The whole job on the user's own pipeline, LoRA files and images; returns the collection's folder.

    Raises:
        CloraError: anything in the input that cannot be used; nothing is written then.
    """
    from clora.atomic import write_atomic
    from clora.export import check_output, export_collection

    _check_exportable(config)
    output = check_output(config.output)
    with stage("load pipeline and LoRAs", None):
        pipeline = load_pipeline(config.pipeline, config.device)
        adapter = adapter_for(pipeline, config.data.size, config.data.max_sequence_length)
        shapes = linear_shapes(pipeline.transformer)
        teachers = {effect.name: load_lora(effect.lora, shapes) for effect in config.effects}
        collection = _collection(config, teachers)  # before training: the files are hashed as they were read
    data = _encode(config, adapter, teachers)
    checkpoint = output / ".checkpoint.safetensors"
    with training_bar(f"distil {len(teachers)} effects", config.train) as report:
        student = train_student(config, adapter, teachers, data, report, checkpoint)
    export_collection(student, collection, output, pipeline.transformer.dtype)
    write_atomic(output / "clora.yaml", dump_config(config))
    checkpoint.unlink(missing_ok=True)  # the folder is made to be shared
    return output


def _check_exportable(config: DistillConfig) -> None:
    """Refuses, before anything is rendered, settings whose result no stock pipeline could run."""
    sampler = config.sampler
    if sampler.integer_timesteps:
        raise CloraError(
            "sampler.integer_timesteps trains at timesteps that no stock scheduler yields; it is there for comparison "
            "through DistillTrainer, switch it off to export"
        )
    if config.objective.target_simulation:
        sigmas = student_schedule(sampler.steps, sampler.shift)
        target_simulation_steps(sigmas, TAU_BOUNDS[config.objective.tau_rule].tau_max)


@contextmanager
def training_bar(title: str, train: TrainConfig) -> Iterator[Report]:
    """Yields a report for `train_student` that moves a bar: by updates, or by seconds where time bounds the run."""
    start = time.monotonic()
    with stage(title, train.updates if train.minutes is None else round(60 * train.minutes)) as advance:
        move = up_to(advance)

        def report(update: int, values: Mapping[str, float]) -> None:
            if train.minutes is None:
                move(update, values)
            else:
                move(min(round(time.monotonic() - start), round(60 * train.minutes)), {"update": update, **values})

        yield report


def find_device(device: str) -> torch.device:
    """The device of this name; ``auto`` is cuda where there is one, else the CPU.

    Raises:
        CloraError: no device has this name, or torch does not find it.
    """
    if not re.fullmatch(DEVICES, device):
        raise CloraError(f"device: expected {DEVICE_NAMES}, found {device!r}")
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise CloraError(
            f"device {device!r}: torch finds {torch.cuda.device_count()} CUDA devices; use another or auto"
        )
    if target.type == "mps" and not torch.backends.mps.is_available():
        raise CloraError(f"device {device!r}: torch finds no Apple GPU; use another or auto")
    return target


def load_pipeline(path: str, device: str):
    """A pipeline by folder or hub id, frozen, on the device (see `find_device`).

    Raises:
        CloraError: it cannot be loaded, or the device is not there.
    """
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    target = find_device(device)
    folder = Path(path).expanduser()
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder if folder.exists() else path)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise CloraError(f"pipeline {path!r} cannot be loaded: {error}") from error
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline.to(target)


def _encode(config: DistillConfig, adapter: Flux2KleinAdapter, teachers: Mapping[str, LoRAState]) -> DistillData:
    from clora.images import load_images

    size = config.data.size
    with stage("encode images and prompts", None):
        _, images = load_images(config.data.sources, size)
        if len(images) <= config.data.held_out:
            raise CloraError(
                f"data.held_out = {config.data.held_out} leaves none of the {len(images)} images in "
                f"{config.data.sources}; lower it or add images"
            )
        _check_pairs(config)
        shared = adapter.encode_images(images[: len(images) - config.data.held_out])
        sources = [_effect_images(effect.sources, shared, adapter, size) for effect in config.effects]
        count = min(config.data.sources_per_effect, max(len(s) for s in sources))
        stacked = torch.stack([_in_turn(s, count) for s in sources])
        teacher_text = adapter.encode_prompts([effect.prompt for effect in config.effects])
        student_text = encode_student_prompts(adapter, config.effects)
        empty_text = adapter.encode_prompts([""])[0]
        general_text = adapter.encode_prompts(general_instructions(config.data) or ("",))
    targets = _targets(config, adapter, teachers, stacked, teacher_text, empty_text)
    return DistillData(
        effects=tuple(teachers),
        sources=stacked,
        targets=targets,
        teacher_text=teacher_text,
        student_text=student_text,
        general_sources=shared,
        general_text=general_text,
        empty_text=empty_text,
        general_targets=_general_targets(config, adapter, shared, general_text, empty_text),
    )


def _targets(config: DistillConfig, adapter, teachers, sources: Tensor, teacher_text: Tensor, empty_text: Tensor):
    """Targets ``[E, M, T, C]``: the images given with an effect, else its teacher's renders."""
    count = sources.shape[1]
    targets = torch.empty_like(sources)
    missing = [i for i, effect in enumerate(config.effects) if effect.targets is None]
    for i, effect in enumerate(config.effects):
        if effect.targets is not None:
            targets[i] = _in_turn(_effect_images(effect.targets, None, adapter, config.data.size), count)
    if missing:
        chosen = {config.effects[i].name: teachers[config.effects[i].name] for i in missing}
        with stage("render targets", 2 * config.sampler.teacher_steps * len(missing) * count) as advance:
            targets[missing] = render_targets(
                adapter, chosen, sources[missing], teacher_text[missing], empty_text, config, advance
            )
    return targets


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
    from clora.images import list_images

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


def _effect_images(folder: str | None, default: Tensor | None, adapter: Flux2KleinAdapter, size) -> Tensor | None:
    from clora.images import load_images

    return default if folder is None else adapter.encode_images(load_images(folder, size)[1])


def _in_turn(images: Tensor, count: int) -> Tensor:
    """The first ``count`` images; fewer are repeated in turn."""
    return images[torch.arange(count) % len(images)]


def encode_student_prompts(adapter: Flux2KleinAdapter, effects: tuple[EffectConfig, ...]) -> Tensor:
    """Embeddings ``[E, P, L, D]`` of each effect's student prompts, repeated in turn up to the longest list."""
    most = max(len(effect.student_prompts) for effect in effects)
    prompts = [effect.student_prompts[i % len(effect.student_prompts)] for effect in effects for i in range(most)]
    return adapter.encode_prompts(prompts).unflatten(0, (len(effects), most))


def _collection(config: DistillConfig, teachers: Mapping[str, LoRAState]):
    from clora.export import make_collection

    base = Path(config.pipeline).name if Path(config.pipeline).expanduser().exists() else config.pipeline
    loras = {effect.name: Path(effect.lora) for effect in config.effects}
    return make_collection(config, base, loras, {name: _license(lora.metadata) for name, lora in teachers.items()})


def _license(metadata: Mapping[str, str]) -> str | None:
    """A LoRA file's licence: kohya and ai-toolkit write it under the ModelSpec name."""
    return metadata.get("modelspec.license") or metadata.get("license")
