"""The whole job on the user's own pipeline, LoRA files and images."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from clora.collection.hub import cached_revision, check_repo, create_repo, is_repo_id, upload
from clora.collection.metadata import LORA_FILE, SAMPLES_FILE, Collection, read_collection
from clora.collection.samples import draw_samples
from clora.collection.write import (
    COLLECTION_FILES,
    UPLOADED_FILES,
    check_output,
    make_collection,
    name_repository,
    write_collection,
)
from clora.commands.checks import find_file_problems
from clora.config.reading import named_files
from clora.config.settings import DistillConfig, TrainConfig, general_instructions
from clora.data.batches import DistillData
from clora.data.cache import Cache
from clora.data.images import list_images
from clora.data.prepare import encode_data
from clora.devices import find_device, find_dtype
from clora.errors import CloraError
from clora.files import check_writable, user_path
from clora.hashing import digest
from clora.lora.layers import linear_shapes, linear_weights
from clora.lora.state import LoRAState
from clora.models import ModelAdapter, adapter_for
from clora.models.fingerprint import component_fingerprints
from clora.models.loading import load_pipeline, load_teacher, with_guidance
from clora.progress import say, stage, up_to
from clora.training.checkpoint import check_resumable, load_values
from clora.training.student import student_layers, train_student
from clora.training.trainer import Report

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
    find_file_problems(config).refuse()
    output = check_output(config.output)
    cache = Cache(check_writable(config.data.cache or output / CACHE))
    if push_to_hub is not None:
        check_repo(push_to_hub)
    with stage("load pipeline and LoRAs", None):
        config, adapter, teachers = _load(config)
        collection = _collection(config, adapter, teachers)  # before training: the files are hashed as they were read
    student_layers(adapter.pipeline.transformer, config.student.targets)  # both before hours of rendering
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
    device, checkpoint = find_device(config.device), output / CHECKPOINT
    with _told_when_stopped(checkpoint):
        data = encode_data(config, adapter, teachers, cache, device)
        with training_bar(f"distil into {output.name}", config.train) as report:
            student = train_student(config, adapter, teachers, data, report, checkpoint)
        samples = _samples(config, adapter, student, data, device)
    write_collection(student, collection, output, adapter.pipeline.transformer.dtype, repo_id, samples)
    checkpoint.unlink(missing_ok=True)  # the folder is made to be shared
    if config.data.cache is None:
        shutil.rmtree(cache.folder, ignore_errors=True)


def _samples(
    config: DistillConfig, adapter: ModelAdapter, student: LoRAState, data: DistillData, device: torch.device
) -> bytes | None:
    """`draw_samples`, or None where the memory does not suffice: pictures are not worth a training."""
    try:
        return draw_samples(config, adapter, student, data, device)
    except RuntimeError as error:
        say(f"no {SAMPLES_FILE} is made: {str(error).splitlines()[0]}")
        return None


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


def _collection(config: DistillConfig, adapter: ModelAdapter, teachers: Mapping[str, LoRAState]):
    is_folder = Path(config.pipeline).exists()
    collection = make_collection(
        config,
        adapter,
        base_model=_name_of_base(adapter.pipeline, Path(config.pipeline)) if is_folder else config.pipeline,
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


def inputs_digest(config: DistillConfig, pipeline) -> str:
    """A hash of all settings and inputs of a run: prompts, pictures and instructions too, which no collection states.

    Not of where it runs and writes, nor of the teachers' files, whose own hashes a collection has.

    Args:
        config: the settings, the guidance filled in.
        pipeline: the base, loaded.

    Raises:
        CloraError: pictures or instructions cannot be read.
    """
    left_out = {"pipeline": True, "output": True, "device": True, "data": {"cache"}}
    settings = config.recorded(exclude=left_out)
    folders = [path for setting, path in named_files(settings).items() if not setting.endswith(".lora")]
    return digest(
        {
            "settings": settings,
            "instructions": general_instructions(config.data),
            "pictures": {folder: _hashes(user_path(folder)) for folder in folders},
            "pipeline": component_fingerprints(pipeline),
        }
    )


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in list_images(folder)}


def is_finished(folder: Path, collection: Collection) -> bool:
    """Whether a folder holds this collection, whole; by which version of clora it was made does not matter."""
    if not all(any(folder.glob(pattern)) for pattern in COLLECTION_FILES):
        return False
    try:
        there = read_collection(folder)
    except CloraError:  # damaged, or no collection
        return False
    return there.model_copy(update={"version": collection.version}) == collection
