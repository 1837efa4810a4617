"""The whole job on the user's own pipeline, LoRA files and images."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from clora.atomic import check_writable
from clora.cache import Cache
from clora.checkpoint import load_values
from clora.collection import LORA_FILE, SAMPLES_FILE, Collection
from clora.config import DEVICE_NAMES, DEVICES, DistillConfig, EffectConfig, TrainConfig
from clora.data import DistillData
from clora.encoders import move
from clora.encoding import encode_data
from clora.errors import CloraError
from clora.flow_matching import student_schedule
from clora.hub import cached_revision, check_repo, create_repo, is_repo_id, upload
from clora.lora.files import linear_shapes, linear_weights, load_lora
from clora.lora.state import LoRAState
from clora.models import ModelAdapter, adapter_for
from clora.objective import TAU_BOUNDS, target_simulation_steps
from clora.paths import user_path
from clora.progress import quiet_libraries, say, stage, up_to
from clora.student import target_modules, train_student
from clora.trainer import Report, check_resumable

CHECKPOINT = ".checkpoint.safetensors"
CACHE = ".clora-cache"  # in the output folder; its .cache is huggingface_hub's, where it came from there


def distill(config: DistillConfig, push_to_hub: str | None = None) -> Path:
    """The whole job on the user's own pipeline, LoRA files and images; returns the collection's folder.

    Where that holds the finished collection of the same settings and inputs, nothing is trained again.

    Args:
        config: the settings.
        push_to_hub: repository on the Hub that the collection is uploaded to; it is created before training.

    Raises:
        CloraError: anything in the input that cannot be used; nothing is written then.
    """
    from clora.export import UPLOADED_FILES, check_output, name_repository
    from clora.finished import is_finished
    from clora.plan.problems import find_file_problems

    find_file_problems(config).refuse()
    output = check_output(config.output)
    cache = Cache(check_writable(config.data.cache or output / CACHE))
    if push_to_hub is not None:
        check_repo(push_to_hub)
    with stage("load pipeline and LoRAs", None):
        config, adapter, teachers = _load(config)
        collection = _collection(config, adapter, teachers)  # before training: the files are hashed as they were read
    target_modules(adapter.pipeline.transformer, config.student.targets)  # both before hours of rendering
    is_done = not (output / CHECKPOINT).exists() and is_finished(output, collection)
    _say_what_is_there(output, config, is_done)
    repo_id = None if push_to_hub is None else create_repo(push_to_hub)
    if not is_done:
        _make(config, adapter, teachers, cache, collection, output, repo_id)
    elif repo_id is not None:
        name_repository(output, repo_id)
    if repo_id is not None:
        say(f"uploaded to {upload(output, repo_id, UPLOADED_FILES)}")
    return output


def _load(config: DistillConfig) -> tuple[DistillConfig, ModelAdapter, dict[str, LoRAState]]:
    """The config with its family's defaults, the pipeline on the CPU, and the teachers."""
    pipeline = load_pipeline(config.pipeline, "cpu", find_dtype(config.dtype, find_device(config.device)))
    adapter = adapter_for(
        pipeline, config.data.size, config.data.max_sequence_length, config.sampler.guidance_embedding
    )
    shapes, weights = linear_shapes(pipeline.transformer), linear_weights(pipeline.transformer)
    teachers = {effect.name: load_teacher(effect, shapes, weights) for effect in config.effects}
    return with_guidance(config, adapter), adapter, teachers


def _make(
    config: DistillConfig,
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    cache: Cache,
    collection: Collection,
    output: Path,
    repo_id: str | None,
) -> None:
    """Trains and writes the collection, and removes what only its making needed."""
    from clora.export import export_collection

    device, checkpoint = find_device(config.device), output / CHECKPOINT
    with _told_when_stopped(checkpoint):
        data = encode_data(config, adapter, teachers, cache, device)
        with training_bar(f"distil into {output.name}", config.train) as report:
            student = train_student(config, adapter, teachers, data, report, checkpoint)
        samples = _samples(config, adapter, student, data, device)
    export_collection(student, collection, output, adapter.pipeline.transformer.dtype, repo_id, samples)
    checkpoint.unlink(missing_ok=True)  # the folder is made to be shared
    if config.data.cache is None:
        shutil.rmtree(cache.folder, ignore_errors=True)


def _samples(
    config: DistillConfig, adapter: ModelAdapter, student: LoRAState, data: DistillData, device: torch.device
) -> bytes | None:
    """`draw_samples`, or None where the memory does not suffice: pictures are not worth a training."""
    from clora.samples import draw_samples

    try:
        return draw_samples(config, adapter, student, data, device)
    except RuntimeError as error:
        say(f"no {SAMPLES_FILE} is made: {str(error).splitlines()[0]}")
        return None


def load_teacher(
    effect: EffectConfig, shapes: Mapping[str, tuple[int, int]], weights: Mapping[str, torch.Tensor]
) -> LoRAState:
    """An effect's LoRA; says so where it is not exact. Raises CloraError as `clora.lora.files.load_lora`."""
    state = load_lora(effect.lora, shapes, weights, max_error=effect.max_error)
    if state.errors:
        worst = max(state.errors.values())
        say(
            f"effect {effect.name}: {len(state.errors)} layers without low rank became factors, error {worst:.2%} at most"
        )
    return state


def with_guidance(config: DistillConfig, adapter: ModelAdapter) -> DistillConfig:
    """The config with the guidance that its family has by default, where it says nothing."""
    w = config.sampler.guidance
    guidance = {
        "guidance": adapter.default_guidance if w is None else w,
        "guidance_embedding": adapter.guidance_embedding,
    }
    return config.model_copy(update={"sampler": config.sampler.model_copy(update=guidance)})


def _say_what_is_there(output: Path, config: DistillConfig, is_done: bool) -> None:
    """Tells of a run that is done or goes on, and of a collection that is replaced.

    Raises:
        CloraError: the checkpoint is another run's.
    """
    checkpoint = output / CHECKPOINT
    if is_done:
        say(
            f"{output} holds the finished collection of these settings and inputs: nothing is trained. To train it "
            "again, remove that folder, or name another output"
        )
    elif checkpoint.exists():
        say(f"going on from update {check_resumable(checkpoint, config)} of the run in {output}")
    elif (output / LORA_FILE).exists():
        say(
            f"{output} holds a finished collection of other settings or inputs, which this run replaces at its end; name "
            "another output to keep it"
        )


@contextmanager
def _told_when_stopped(checkpoint: Path) -> Iterator[None]:
    """Says after Ctrl-C what was kept."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint.exists():
            say(f"stopped; the same command goes on from update {load_values(checkpoint)['update']}")
        else:
            say(
                "stopped; what was encoded and rendered is kept for the same command; of the training nothing is kept "
                "before the first checkpoint (train.checkpoint_every)"
            )
        raise


def check_exportable(config: DistillConfig) -> None:
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


def find_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; ``auto`` is bfloat16 on CUDA, else float32."""
    name = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    return getattr(torch, name)


def load_pipeline(path: str, device: str, dtype: torch.dtype = torch.float32):
    """A pipeline by folder or hub id, frozen.

    Args:
        path: folder or hub id.
        device: where all of it goes (see `find_device`).
        dtype: of all its weights, whatever they were saved in, but those that their own configuration quantises.

    Raises:
        CloraError: it cannot be loaded, or the device is not there.
    """
    from diffusers import DiffusionPipeline

    from clora.plan.skeleton import check_processors

    target = find_device(device)
    folder = user_path(path)
    _refuse_pickles(folder)
    check_processors(path)
    try:
        with quiet_libraries():
            pipeline = DiffusionPipeline.from_pretrained(folder if folder.exists() else path, **_dtype_argument(dtype))
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
                move(component, target)
        return pipeline
    except Exception as error:  # readers of damaged configs, tokenizers and weights raise whatever they meet
        raise CloraError(f"pipeline {path!r} cannot be loaded: {error}") from error


def _dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """``from_pretrained``'s own, under the name that it has in this version."""
    import diffusers

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


def _refuse_pickles(folder: Path) -> None:
    """Where a component has no safetensors, diffusers would open its pickle, which can run any code."""
    for file in sorted(folder.glob("*/*.bin")):
        if not any(file.parent.glob("*.safetensors")):
            raise CloraError(
                f"{file} is a pickle, which can run any code when it is opened, so it is refused; expected "
                "safetensors. If you trust its author, load the pipeline once in an isolated environment and write it "
                "with save_pretrained(folder, safe_serialization=True)"
            )


def _collection(config: DistillConfig, adapter: ModelAdapter, teachers: Mapping[str, LoRAState]):
    from clora.export import make_collection
    from clora.finished import inputs_digest

    is_folder = user_path(config.pipeline).exists()
    collection = make_collection(
        config,
        pipeline=type(adapter.pipeline).__name__,
        call=adapter.student_call,
        base_model=_name_of_base(adapter.pipeline, user_path(config.pipeline)) if is_folder else config.pipeline,
        loras={effect.name: Path(effect.lora) for effect in config.effects},
        licenses={name: _license(lora.metadata) for name, lora in teachers.items()},
        base_revision=None if is_folder else cached_revision(config.pipeline),
    )
    inputs = {"inputs_sha256": inputs_digest(config, adapter.pipeline)}
    return collection.model_copy(update={"provenance": {**collection.provenance, **inputs}})


def _name_of_base(pipeline, folder: Path) -> str:
    """What a local pipeline is called: the hub id that it was once loaded from, where its folder states one."""
    stated = json.loads((folder / "model_index.json").read_text("utf-8")).get("_name_or_path")
    if isinstance(stated, str) and is_repo_id(stated) and not user_path(stated).exists():
        return stated
    return f"a local {type(pipeline).__name__} (folder {folder.resolve().name})"


def _license(metadata: Mapping[str, str]) -> str | None:
    """A LoRA file's licence: kohya and ai-toolkit write it under the ModelSpec name."""
    return metadata.get("modelspec.license") or metadata.get("license")
