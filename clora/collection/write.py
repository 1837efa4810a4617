"""Writing a collection: a folder that stock diffusers loads, with LoRA, scheduler, model card and samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clora.collection.card import CARD_MARK, model_card
from clora.collection.metadata import (
    LORA_FILE,
    SAMPLES_FILE,
    WEIGHTS_DIGEST,
    CollectedEffect,
    Collection,
    Sampling,
    from_metadata,
    read_collection,
    to_metadata,
)
from clora.config.settings import DistillConfig, EffectConfig
from clora.errors import CloraError
from clora.files import check_writable, remove_file, replacing, write_atomic
from clora.hashing import tensor_digest
from clora.lora.save import check_storable, save_lora
from clora.lora.source import open_lora, weights_digest
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.loading import run_dtype
from clora.version import __version__

CARD_FILE = "README.md"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
COLLECTION_FILES = (CARD_FILE, LORA_FILE, SCHEDULER_FILE)
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
            prompts=_asked(config, effect),
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
        provenance=config.recorded(include=SHARED_SETTINGS) | {"dtype": run_dtype(config)},
    )


def _asked(config: DistillConfig, effect: EffectConfig) -> tuple[str, ...]:
    """The prompts by which the student is asked for an effect."""
    return effect.student_prompts if config.objective.orthogonal_prompting else (effect.prompt,)


def has_settings(collection: Collection, config: DistillConfig) -> bool:
    """Returns whether a collection states a config's settings and prompts; base, LoRAs, pictures and dtype may differ."""
    return (
        {name: collection.provenance.get(name) for name in SHARED_SETTINGS} == config.recorded(include=SHARED_SETTINGS)
        and collection.sampling.size == config.data.size
        and {e.name: e.prompts for e in collection.effects} == {e.name: _asked(config, e) for e in config.effects}
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

    A collection that is there already is replaced whole. Whenever the process dies, the folder holds the old collection, or no
    weights, or the new collection: weights never stand beside another's scheduler, card or samples.

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
    weights_sha256 = check_storable(student, folder / LORA_FILE, dtype)
    metadata = to_metadata(collection) | {WEIGHTS_DIGEST: weights_sha256}
    # Everything is on the disk, under hidden names, before anything is replaced. At the end the names are given in reverse
    # order, so that a folder that has weights is complete.
    with (
        replacing(folder / LORA_FILE) as weights,
        replacing(folder / CARD_FILE) as card,
        replacing(folder / SCHEDULER_FILE) as scheduler,
    ):
        save_lora(student, weights, dtype=dtype, metadata=metadata)
        write_atomic(card, model_card(collection, hub_id))
        write_atomic(scheduler, _scheduler_text(collection))
        remove_file(folder / LORA_FILE)
        remove_file(folder / SAMPLES_FILE)
    return folder


def _scheduler_text(collection: Collection) -> str:
    """Returns the scheduler's file as diffusers' save_pretrained writes it."""
    return json.dumps(collection.scheduler, indent=2, sort_keys=True) + "\n"


def is_finished(folder: Path, *collections: Collection) -> bool:
    """Returns whether a folder holds one of these collections as it was written, by any version of clora.

    Compared are the description, the values of all weights with the hash beside them (earlier versions stated none), and
    the scheduler. Of the card, which a person may edit, only clora's mark is looked for.
    """
    try:
        source = open_lora(folder / LORA_FILE)
        found = from_metadata(source.metadata, str(source.file))
        weights_sha256 = tensor_digest(load_file(source.file))
        scheduler = (folder / SCHEDULER_FILE).read_text("utf-8")
        card = (folder / CARD_FILE).read_text("utf-8")
    except (CloraError, OSError, UnicodeDecodeError, SafetensorError):  # missing, damaged, or no collection
        return False
    return (
        # Another version's collection of the same run is finished too.
        any(found == collection.model_copy(update={"version": found.version}) for collection in collections)
        and source.metadata.get(WEIGHTS_DIGEST, weights_sha256) == weights_sha256
        and scheduler == _scheduler_text(found)
        and CARD_MARK in card
    )


def add_samples(folder: Path, samples: bytes, hub_id: str | None = None, shown: bool = True) -> None:
    """Adds sample pictures to a collection and shows them in its model card.

    Args:
        folder: of the collection.
        samples: a PNG (`clora.collection.samples.draw_samples`).
        hub_id: as in `write_collection`.
        shown: False if the card goes to where the samples do not.

    Raises:
        CloraError: no collection exists there, or a file cannot be written.
    """
    card = model_card(read_collection(folder), hub_id, has_samples=shown)
    # The card gets its name first: a run that dies between the two has no samples, and the next one adds both.
    with replacing(folder / SAMPLES_FILE) as file:
        file.write_bytes(samples)
        write_atomic(folder / CARD_FILE, card)


def name_repository(folder: Path, hub_id: str, shown: bool) -> None:
    """Names the hub id in the model card of a finished collection, unless a person has edited the card.

    Args:
        folder: of the collection.
        hub_id: as in `write_collection`.
        shown: whether the card shows the samples, if there are any.

    Raises:
        CloraError: no collection exists there, or the card cannot be written.
    """
    collection = read_collection(folder)
    card = folder / "README.md"
    text = card.read_text("utf-8", errors="replace")
    if text in (model_card(collection, has_samples=has) for has in (False, True)):
        write_atomic(card, model_card(collection, hub_id, shown and (folder / SAMPLES_FILE).exists()))


def scheduler_config(shift: float) -> dict[str, object]:
    """Returns the config of diffusers' scheduler for the few-step sampler (docs/method.md, section 3)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    # A static shift, and fresh noise at every step.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    return json.loads(scheduler.to_json_string())
