"""``clora distill``: from the user's own pipeline, LoRA files and images to a collection."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from clora.config.settings import DistillConfig, general_instructions
from clora.config.training import TrainConfig
from clora.data.cache import Cache
from clora.data.images import list_images
from clora.data.prepare import encode_data
from clora.devices import find_device
from clora.errors import CloraError
from clora.files import check_writable, user_path
from clora.hashing import digest, file_digest
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.fingerprint import component_fingerprints
from clora.models.loading import load_adapter, load_teacher
from clora.progress import say, stage, up_to
from clora.training.checkpoint import check_resumable, load_values
from clora.training.student import student_layers, train_student
from clora.training.trainer import Report

CHECKPOINT = ".checkpoint.safetensors"
# In the output folder; huggingface_hub has a .cache of its own in a folder that it downloaded.
CACHE = ".clora-cache"


def distill(config: DistillConfig, push_to_hub: str | None = None) -> Path:
    """Distils the user's LoRA files into one collection.

    A folder that already holds the finished collection of the same settings and inputs is left as it is.

    Args:
        config: the settings.
        push_to_hub: repository on the Hub that the collection is uploaded to; it is created before training.

    Returns:
        The collection's folder.

    Raises:
        CloraError: anything in the input that cannot be used; nothing is written then.
    """
    if not isinstance(config, DistillConfig):
        found = type(config).__name__
        raise CloraError(f"expected a DistillConfig, found {found}; load it with clora.load_config(path)")
    find_file_problems(config).refuse()
    output = check_output(config.output)
    checkpoint = output / CHECKPOINT
    cache_folder = check_writable(config.data.cache or output / CACHE)
    if push_to_hub is not None:
        check_repo(push_to_hub)
    with stage("load pipeline and LoRAs", None):
        config, adapter = load_adapter(config)
        transformer = adapter.pipeline.transformer
        teachers = {effect.name: load_teacher(effect, transformer) for effect in config.effects}
        # Before training, so that the hashes are those of the files that were read.
        collection = _describe(config, adapter, teachers)
    # Rendering takes hours; wrong layers and a checkpoint of another run are refused before it.
    student_layers(transformer, config.student.targets)
    is_done = not checkpoint.exists() and is_finished(output, collection)
    _announce(output, config, is_done)
    repo_id = None if push_to_hub is None else create_repo(push_to_hub)
    if not is_done:
        student, samples = _train(config, adapter, teachers, Cache(cache_folder), checkpoint)
        write_collection(student, collection, output, transformer.dtype, repo_id, samples)
        # The folder is made to be shared: only the collection stays in it.
        checkpoint.unlink(missing_ok=True)
        if config.data.cache is None:
            shutil.rmtree(cache_folder, ignore_errors=True)
    elif repo_id is not None:
        name_repository(output, repo_id)
    if repo_id is not None:
        say(f"uploaded to {upload(output, repo_id, UPLOADED_FILES)}")
    return output


def _describe(config: DistillConfig, adapter: ModelAdapter, teachers: Mapping[str, LoRAState]) -> Collection:
    """Returns the description of the collection that a run makes, with the hash of its inputs."""
    folder = Path(config.pipeline)
    metadata = {name: lora.metadata for name, lora in teachers.items()}
    collection = make_collection(
        config,
        adapter,
        base_model=_name_of_base(adapter.pipeline, folder) if folder.exists() else config.pipeline,
        loras={effect.name: Path(effect.lora) for effect in config.effects},
        # kohya and ai-toolkit write the licence under the ModelSpec name.
        licenses={name: keys.get("modelspec.license") or keys.get("license") for name, keys in metadata.items()},
        base_revision=None if folder.exists() else cached_revision(config.pipeline),
    )
    inputs = {"inputs_sha256": inputs_digest(config, adapter.pipeline)}
    return collection.model_copy(update={"provenance": {**collection.provenance, **inputs}})


def _name_of_base(pipeline: Any, folder: Path) -> str:
    """Names a local pipeline: the hub id that it was once loaded from, if its folder states one."""
    stated = json.loads((folder / "model_index.json").read_text("utf-8")).get("_name_or_path")
    if isinstance(stated, str) and is_repo_id(stated) and not Path(stated).exists():
        return stated
    return f"a local {type(pipeline).__name__} (folder {folder.resolve().name})"


def inputs_digest(config: DistillConfig, pipeline: Any) -> str:
    """Hashes all settings and inputs of a run: prompts, pictures and instructions too, which no collection states.

    Left out are the places where it runs and writes, and the teachers' files, whose hashes the collection has.

    Args:
        config: the settings, the guidance filled in.
        pipeline: the base, loaded.

    Raises:
        CloraError: pictures or instructions cannot be read.
    """
    settings = config.recorded(exclude={"pipeline": True, "output": True, "device": True, "data": {"cache"}})
    # Of every picture the bytes: one that is replaced under its old name makes another run.
    pictures = {}
    for setting, folder in named_files(settings).items():
        if not setting.endswith(".lora"):
            files = list_images(user_path(folder))
            pictures[folder] = {file.name: file_digest(file) for file in files}
    return digest(
        {
            "settings": settings,
            "instructions": general_instructions(config.data),
            "pictures": pictures,
            "pipeline": component_fingerprints(pipeline),
        }
    )


def is_finished(folder: Path, collection: Collection) -> bool:
    """Returns whether a folder holds this collection, whole, made by any version of clora."""
    if not all(any(folder.glob(pattern)) for pattern in COLLECTION_FILES):
        return False
    try:
        found = read_collection(folder)
    except CloraError:  # damaged, or no collection
        return False
    # Another version's collection of the same run is finished too.
    return found.model_copy(update={"version": collection.version}) == collection


def _announce(output: Path, config: DistillConfig, is_done: bool) -> None:
    """Reports a run that is done or goes on, or a collection that is replaced.

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
        say(f"resuming at update {check_resumable(checkpoint, config)} of the run in {output}")
    elif (output / LORA_FILE).exists():
        say(
            f"{output} holds a finished collection of other settings or inputs, which this run replaces at its end; name "
            "another output to keep it"
        )


def _train(
    config: DistillConfig,
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    cache: Cache,
    checkpoint: Path,
) -> tuple[LoRAState, bytes | None]:
    """Returns the student and its samples; None for samples that do not fit the memory."""
    device = find_device(config.device)
    try:
        data = encode_data(config, adapter, teachers, cache, device)
        with training_bar(f"distil into {checkpoint.parent.name}", config.train) as report:
            student = train_student(config, adapter, teachers, data, report, checkpoint)
        try:
            return student, draw_samples(config, adapter, student, data, device)
        except RuntimeError as error:  # pictures are not worth a training
            say(f"no {SAMPLES_FILE} is made: {str(error).splitlines()[0]}")
            return student, None
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
    seconds = None if train.minutes is None else round(60 * train.minutes)
    with stage(title, train.updates if seconds is None else seconds) as advance:
        # Where time bounds the run, nobody knows the number of updates: the bar counts seconds.
        move = up_to(advance)

        def report(update: int, values: Mapping[str, float]) -> None:
            if seconds is None:
                move(update, values)
            else:
                move(min(round(time.monotonic() - start), seconds), {"update": update, **values})

        yield report
