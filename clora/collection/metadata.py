"""The description of a collection: what its LoRA file's metadata states, written and read back without loss.

The file is the collection; everything that `clora.apply` needs is in its header, so that the file may be moved, renamed or
uploaded without the rest of its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, JsonValue, ValidationError
from safetensors.torch import load_file

from clora.collection.hub import download, is_repo_id
from clora.config.fields import Pixels, Steps, Tokens
from clora.errors import CloraError
from clora.files import user_path
from clora.hashing import tensor_digest
from clora.lora.shards import all_shards
from clora.lora.source import LoRASource, open_lora

LORA_FILE = "pytorch_lora_weights.safetensors"
SAMPLES_FILE = "samples.png"
# Every entry has this prefix: diffusers and sglang give meanings to others, such as lora_adapter_metadata and alpha.
PREFIX = "clora."
WEIGHTS_DIGEST = PREFIX + "weights_sha256"  # the `tensor_digest` of the weights, that of the file as it was written
# Entries that hold plain text; all others hold JSON.
_PLAIN = {"version", "pipeline", "base_model", "base_revision"}

Number = Annotated[float, Field(allow_inf_nan=False)]


class CollectedEffect(BaseModel, frozen=True):
    """One effect of a collection: how to ask for it, and where it comes from.

    Attributes:
        name: of the effect.
        prompts: the student's prompts; use the first, the others are paraphrases of it.
        teacher: file name of the teacher that it was distilled from.
        teacher_sha256: hash of that file.
        trigger: the word that only this effect's prompts contain; None if they are the teacher's own prompts.
        license: the teacher's licence, if its file states one.
    """

    name: str
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    teacher: str
    teacher_sha256: str
    trigger: str | None = None
    license: str | None = None


class Sampling(BaseModel, frozen=True):
    """The settings of the few-step sampler (docs/method.md, section 3).

    Attributes:
        steps: number of passes.
        shift: time shift of the noise levels.
        size: height and width of the training images, in pixels.
        max_sequence_length: number of text tokens that the pipeline must be called with.
        call: other arguments that this family's pipeline needs, such as the scale that switches guidance off.
    """

    steps: Steps
    shift: Number
    size: tuple[Pixels, Pixels]
    max_sequence_length: Tokens
    call: dict[str, int | Number] = {}


class Collection(BaseModel, frozen=True):
    """The entries that stand beside the weights; each attribute is the entry ``clora.<attribute>``, text or JSON.

    Attributes:
        version: of the clora that made it.
        pipeline: class name of the pipeline that it is for.
        base_model: hub id of the pipeline, or a description of a local one.
        base_revision: commit of the pipeline on the Hub, if it came from there.
        effects: at least one.
        sampling: settings of the few-step sampler.
        scheduler: diffusers' config of the scheduler that runs it.
        metrics: measured values by name, or by name and effect.
        provenance: anything else worth keeping (seed, settings).
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
    """Returns the entries of the file's header.

    Raises:
        CloraError: a value would not be read back as it is.
    """
    values = collection.model_dump(mode="json", exclude_none=True)
    metadata = {PREFIX + key: value if key in _PLAIN else json.dumps(value) for key, value in values.items()}
    # JSON has no NaN, and its keys are text only: such a value would come back as another.
    if from_metadata(metadata, "the new collection") != collection:
        raise CloraError("the collection's metadata would not be read back as it is; expected JSON values only")
    return metadata


def from_metadata(metadata: Mapping[str, str], where: str) -> Collection:
    """Reads the entries back; unknown ones, such as those of a newer version, are ignored.

    Args:
        metadata: of a file's header.
        where: file name for the error message.

    Raises:
        CloraError: no collection, or damaged entries.
    """
    if f"{PREFIX}effects" not in metadata:
        raise CloraError(
            f"{where} is not a clora collection: it has no {PREFIX}effects in its metadata; expected the folder that `clora distill` wrote"
        )
    found = {name: metadata[PREFIX + name] for name in Collection.model_fields if PREFIX + name in metadata}
    try:
        values = {name: text if name in _PLAIN else json.loads(text) for name, text in found.items()}
        return Collection.model_validate(values)
    # ValueError of JSON that is none, and of integers with thousands of digits.
    except (ValidationError, ValueError, RecursionError) as error:
        raise CloraError(f"{where}: the collection's metadata is damaged: {str(error)[:1000]}") from error


def find_collection(path: str | Path) -> Path:
    """Returns the path of a collection for `open_lora`; one on the Hub is downloaded.

    Args:
        path: its folder, its file or its hub id (``owner/name``).

    Raises:
        CloraError: it does not exist, or cannot be downloaded.
    """
    local = user_path(path)
    # A local path wins over a hub id that is spelled the same, and what can be no id is never looked up.
    if local.exists():
        return local
    if local.suffix == ".safetensors" or not is_repo_id(str(path)):
        raise CloraError(f"{path} does not exist; expected a collection's folder, its file or its hub id (owner/name)")
    return download(str(path), LORA_FILE)


def read_collection(path: str | Path) -> Collection:
    """Reads the description of a collection from its file's header.

    Args:
        path: as for `find_collection`.

    Raises:
        CloraError: no such file, or not a collection.
    """
    source = open_lora(find_collection(path))
    return from_metadata(source.metadata, str(source.file))


def check_digest(source: LoRASource) -> None:
    """Refuses a collection whose weights are not those that it was written with; earlier versions stated no digest.

    Raises:
        CloraError: the digest of the weights is another one.
    """
    stated = source.metadata.get(WEIGHTS_DIGEST)
    if stated is None:
        return
    tensors = {}
    for shard in all_shards(source.file):
        tensors |= load_file(shard)
    if tensor_digest(tensors) != stated:
        raise CloraError(
            f"{source.file}: its weights are not those that its metadata states ({WEIGHTS_DIGEST}), so that the file was damaged or "
            "changed after it was written; download or export it again"
        )
