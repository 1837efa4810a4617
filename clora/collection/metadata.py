"""What a collection says about itself, as entries of its LoRA file's metadata: written once, read back the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from clora.collection.hub import download, is_repo_id
from clora.errors import CloraError
from clora.files import user_path
from clora.lora.source import find_weights, open_lora

LORA_FILE = "pytorch_lora_weights.safetensors"
SAMPLES_FILE = "samples.png"
PREFIX = (
    "clora."  # of every entry; diffusers and sglang give meanings to others, such as lora_adapter_metadata and alpha
)

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class CollectedEffect(_Model):
    """One effect of a collection, as its user asks for it.

    Attributes:
        name: the effect.
        prompts: the student's prompts, the first is the one to use, the others say the same in other words.
        teacher: file name of the teacher it was distilled from.
        teacher_sha256: hash of that file.
        trigger: the word that the prompts have and nothing else has; None where they are the teacher's own prompts.
        license: the teacher's licence where its file says so.
    """

    name: str
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    teacher: str
    teacher_sha256: str
    trigger: str | None = None
    license: str | None = None


class Sampling(_Model):
    """How the few-step sampler runs.

    Attributes:
        steps: its passes.
        shift: its time shift.
        size: height and width it was trained at.
        max_sequence_length: text tokens that the pipeline must be called with.
        call: the other arguments that the family's pipeline needs, such as the scale of a guidance that is off.
    """

    steps: Positive
    shift: Number
    size: tuple[Positive, Positive]
    max_sequence_length: Positive
    call: dict[str, int | float] = {}


class Collection(_Model):
    """What is written beside the weights; each attribute is the entry ``clora.<attribute>``, text or JSON.

    Attributes:
        version: of the clora that made it.
        pipeline: class name of the pipeline it is for.
        base_model: hub id of the pipeline, or what a local one is called.
        base_revision: its commit on the Hub where it came from there.
        effects: the effects.
        sampling: how to sample.
        scheduler: diffusers' config of the scheduler that does so.
        metrics: measured values by name, or by name and effect.
        provenance: anything else worth keeping (seed, config).
    """

    version: str
    pipeline: str
    base_model: str
    base_revision: str | None = None
    effects: Annotated[tuple[CollectedEffect, ...], Field(min_length=1)]
    sampling: Sampling
    scheduler: dict[str, JsonValue]
    metrics: dict[str, Number | dict[str, Number]] = {}
    provenance: dict[str, JsonValue] = {}


def to_metadata(collection: Collection) -> dict[str, str]:
    """The entries of the file's header.

    Raises:
        CloraError: what a reader would find differs from the collection.
    """
    values = collection.model_dump(mode="json", exclude_none=True)
    metadata = {PREFIX + key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    if from_metadata(metadata, "the new collection") != collection:
        raise CloraError("the collection's metadata would not be read back as it is; expected JSON values only")
    return metadata


def from_metadata(metadata: Mapping[str, str], where: str) -> Collection:
    """Reads the entries back; those that are not known, as of a newer version, are passed over.

    Args:
        metadata: of a file's header.
        where: file name for the error message.

    Raises:
        CloraError: no collection, or damaged entries.
    """
    if f"{PREFIX}effects" not in metadata:
        raise CloraError(f"{where} is no collection of clora's: it has no {PREFIX}effects in its metadata")
    try:
        return Collection.model_validate({name: _parse(metadata, name) for name in _fields_in(metadata)})
    except (ValidationError, json.JSONDecodeError, RecursionError) as error:
        raise CloraError(f"{where}: the collection's metadata is damaged: {error}") from error


def _fields_in(metadata: Mapping[str, str]) -> list[str]:
    return [name for name in Collection.model_fields if PREFIX + name in metadata]


def _parse(metadata: Mapping[str, str], name: str) -> Any:
    value = metadata[PREFIX + name]
    return value if name in ("version", "pipeline", "base_model", "base_revision") else json.loads(value)


def find_collection(path: str | Path) -> Path:
    """The LoRA file of a collection, given by its folder, the file itself or its hub id (``owner/name``).

    Raises:
        CloraError: nothing there, or it cannot be downloaded.
    """
    local = user_path(path)
    if local.exists() or local.suffix == ".safetensors" or not is_repo_id(str(path)):
        return find_weights(local)
    return download(str(path), LORA_FILE)


def read_collection(path: str | Path) -> Collection:
    """What a collection says about itself, read from its file's header.

    Args:
        path: as for `find_collection`.

    Raises:
        CloraError: no such file, or not a collection.
    """
    file = find_collection(path)
    return from_metadata(open_lora(file).metadata, str(file))
