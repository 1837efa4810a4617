"""Whether an output folder already holds what a run would make: the same settings, the same inputs, nothing missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

from clora.cache import digest
from clora.collection import Collection, read_collection
from clora.config import DistillConfig, general_instructions
from clora.config_file import named_files
from clora.errors import CloraError
from clora.export import COLLECTION_FILES
from clora.fingerprint import component_fingerprints
from clora.images import list_images


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
    settings = config.model_dump(mode="json", exclude=left_out)
    folders = [path for setting, path in named_files(settings).items() if not setting.endswith(".lora")]
    return digest(
        {
            "settings": settings,
            "instructions": general_instructions(config.data),
            "pictures": {folder: _hashes(folder) for folder in folders},
            "pipeline": component_fingerprints(pipeline),
        }
    )


def _hashes(folder: str) -> dict[str, str]:
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
