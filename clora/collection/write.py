"""Writing a collection: a folder that stock diffusers loads, with LoRA, scheduler, model card and samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from clora.collection.card import CARD_MARK, model_card
from clora.collection.metadata import (
    LORA_FILE,
    SAMPLES_FILE,
    CollectedEffect,
    Collection,
    Sampling,
    read_collection,
    to_metadata,
)
from clora.config.settings import DistillConfig
from clora.errors import CloraError
from clora.files import check_writable, write_atomic
from clora.lora.save import check_storable, save_lora
from clora.lora.source import weights_digest
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.version import __version__

# Patterns of the files that every collection has, and of those that are uploaded.
COLLECTION_FILES = ("README.md", LORA_FILE, "scheduler/*")
UPLOADED_FILES = (*COLLECTION_FILES, SAMPLES_FILE)
SHARED_SETTINGS = {"student", "sampler", "objective", "train", "seed"}  # without this machine's paths


def make_collection(
    config: DistillConfig,
    adapter: ModelAdapter,
    base_model: str,
    loras: Mapping[str, Path],
    licenses: Mapping[str, str | None],
    base_revision: str | None = None,
) -> Collection:
    """Describes the collection of a distillation.

    Args:
        config: of the distillation.
        adapter: the model family, with its pipeline.
        base_model: hub id of the pipeline, or a description of a local one.
        loras: effect name to its teacher's file or folder, which is hashed.
        licenses: effect name to its teacher's licence, None if unknown.
        base_revision: commit of the base model on the Hub.

    Raises:
        CloraError: a teacher's file cannot be read.
    """
    # Without orthogonal prompting the student reads the teachers' own prompts, and no trigger means anything.
    own_prompts = config.objective.orthogonal_prompting
    effects = tuple(
        CollectedEffect(
            name=effect.name,
            prompts=effect.student_prompts if own_prompts else (effect.prompt,),
            teacher=loras[effect.name].name,
            teacher_sha256=weights_digest(loras[effect.name]),
            trigger=effect.trigger if own_prompts else None,
            license=licenses[effect.name],
        )
        for effect in config.effects
    )
    return Collection(
        version=__version__,
        pipeline=type(adapter.pipeline).__name__,
        base_model=base_model,
        base_revision=base_revision,
        effects=effects,
        sampling=Sampling(
            steps=config.sampler.steps,
            shift=config.sampler.shift,
            size=config.data.size,
            max_sequence_length=config.data.max_sequence_length,
            call=dict(adapter.student_call),
        ),
        scheduler=scheduler_config(config.sampler.shift),
        provenance=config.recorded(include=SHARED_SETTINGS),
    )


def check_output(folder: str | Path) -> Path:
    """Refuses, before long work starts, a folder that a collection cannot be written to.

    Raises:
        CloraError: the folder cannot be written, or holds a README.md that is not a collection's.
    """
    path = check_writable(folder)
    check_writable(path / "scheduler")
    card = path / "README.md"
    if card.is_file() and CARD_MARK not in card.read_text("utf-8", errors="replace"):
        raise CloraError(f"output folder {path} holds another README.md; choose an empty or a new folder")
    return path


def write_collection(
    student: LoRAState,
    collection: Collection,
    folder: Path,
    dtype: torch.dtype,
    hub_id: str | None = None,
) -> Path:
    """Writes the folder of a collection, without samples; returns it.

    ``pytorch_lora_weights.safetensors`` has keys ``transformer.X.lora_A/B.weight``, uniform rank and alpha = rank:
    every version of diffusers and ComfyUI read it alike. `clora.collection.metadata.read_collection` reads the
    description from it. ``scheduler/`` yields the student's timesteps, whatever shift the pipeline passes.

    Args:
        student: the trained LoRA.
        collection: its description.
        folder: created if it is missing.
        dtype: stored type.
        hub_id: where the collection will be on the Hub, for the model card.

    Raises:
        CloraError: the folder cannot be written, a weight is not finite, or the weights are not read back as they were
            written.
    """
    check_output(folder)
    check_storable(student, folder / LORA_FILE, dtype)
    metadata = to_metadata(collection)
    # A collection may be there already. Every part is replaced or removed, the weights last: a folder that has new
    # weights is complete.
    (folder / SAMPLES_FILE).unlink(missing_ok=True)
    write_atomic(folder / "README.md", model_card(collection, hub_id))
    # As diffusers' save_pretrained writes it.
    scheduler = json.dumps(collection.scheduler, indent=2, sort_keys=True) + "\n"
    write_atomic(folder / "scheduler" / "scheduler_config.json", scheduler)
    save_lora(student, folder / LORA_FILE, dtype=dtype, metadata=metadata)
    return folder


def add_samples(folder: Path, samples: bytes, hub_id: str | None = None) -> None:
    """Adds sample pictures to a collection and shows them in its model card.

    Args:
        folder: of the collection.
        samples: a PNG (`clora.collection.samples.draw_samples`).
        hub_id: as in `write_collection`.

    Raises:
        CloraError: no collection exists there, or a file cannot be written.
    """
    collection = read_collection(folder)
    write_atomic(folder / SAMPLES_FILE, samples)
    write_atomic(folder / "README.md", model_card(collection, hub_id, has_samples=True))


def name_repository(folder: Path, hub_id: str) -> None:
    """Names the hub id in the model card of a finished collection, unless a person has edited the card.

    Raises:
        CloraError: no collection exists there, or the card cannot be written.
    """
    collection = read_collection(folder)
    card = folder / "README.md"
    has_samples = (folder / SAMPLES_FILE).exists()
    if card.read_text("utf-8", errors="replace") == model_card(collection, has_samples=has_samples):
        write_atomic(card, model_card(collection, hub_id, has_samples))


def scheduler_config(shift: float) -> dict[str, object]:
    """Returns the config of diffusers' scheduler for the few-step sampler (docs/method.md, section 3)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    # A static shift, and fresh noise at every step.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    return json.loads(scheduler.to_json_string())
