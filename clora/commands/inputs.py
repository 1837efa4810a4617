"""The inputs of a distillation as hashes: by them a finished collection, and the data of a checkpoint, are known again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clora.config.fields import as_written
from clora.config.reading import named_files
from clora.config.settings import DistillConfig, general_instructions
from clora.data.images import list_images
from clora.data.prepare import num_shared
from clora.data.rendering import lora_digest
from clora.hashing import digest, file_digest
from clora.lora.state import LoRAState
from clora.models.fingerprint import component_fingerprints
from clora.training.resume import lora_input, picture_input


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        pictures: folder, as the config names it, to file name to sha256; all files, in the order of `list_images`.
        instructions: of the general stream.
        components: fingerprints of the base's parts.
    """

    pictures: Mapping[str, Mapping[str, str]]
    instructions: tuple[str, ...]
    components: Mapping[str, str]


def read_inputs(config: DistillConfig, pipeline: Any) -> Inputs:
    """Hashes pictures, instructions and the base.

    Args:
        config: the settings.
        pipeline: the base, loaded.

    Raises:
        CloraError: pictures or instructions cannot be read.
    """
    return Inputs(hash_pictures(config), general_instructions(config.data), component_fingerprints(pipeline))


def hash_pictures(config: DistillConfig) -> dict[str, dict[str, str]]:
    """Hashes the bytes of every picture: one that is replaced under its old name makes another run.

    Raises:
        CloraError: a folder or a picture cannot be read.
    """
    pictures = {}
    for setting, folder in named_files(config.model_dump()).items():
        if not setting.endswith(".lora"):
            # As written, so that a run may be continued from another working directory.
            pictures[as_written(folder)] = {file.name: file_digest(file) for file in list_images(folder)}
    return pictures


def inputs_digest(config: DistillConfig, inputs: Inputs, dtype: str = "auto") -> str:
    """Hashes all settings and inputs of a run: prompts, pictures and instructions too, which no collection states.

    Left out are the places where it runs and writes, and the teachers' files, whose hashes the collection has.

    Args:
        config: the settings, the guidance filled in.
        inputs: of this config.
        dtype: stands for the setting. A collection states what was computed in; earlier versions hashed what was set.
    """
    settings = config.recorded(exclude={"pipeline": True, "output": True, "device": True, "data": {"cache"}})
    return digest(
        {
            "settings": {**settings, "dtype": dtype},
            "instructions": inputs.instructions,
            "pictures": inputs.pictures,
            "pipeline": inputs.components,
        }
    )


def trained_on(config: DistillConfig, inputs: Inputs, teachers: Mapping[str, LoRAState]) -> dict[str, str]:
    """Returns the hash of each input that training depends on, by its name for messages.

    Pictures that are held out, or of which there are more than are rendered, are not among them.
    """
    named = {}
    for folder, count in _pictures_used(config).items():
        for name, hashed in list(inputs.pictures[folder].items())[:count]:
            named[picture_input(folder, name)] = hashed
    if config.objective.dual_stream:
        named["the list of general instructions"] = digest(inputs.instructions)
    for name, teacher in teachers.items():
        named[lora_input(name)] = lora_digest(teacher)
    return named | {f"the base model's {part}": hashed for part, hashed in inputs.components.items()}


def _pictures_used(config: DistillConfig) -> dict[str, int | None]:
    """The number of pictures, the first ones, that are used of each folder; None for all."""
    settings = config.model_dump(mode="json")
    shared = settings["data"]["sources"]
    used: dict[str, int | None] = {}
    if config.objective.dual_stream or any(effect.sources is None for effect in config.effects):
        used[shared] = num_shared(config)
    for effect in settings["effects"]:
        if effect["sources"] is not None:
            limit = config.data.sources_per_effect if effect["targets"] is None else None
            # A folder that is used twice counts with the most that is used.
            before = used.get(effect["sources"], 0)
            used[effect["sources"]] = None if limit is None or before is None else max(limit, before)
        if effect["targets"] is not None:
            used[effect["targets"]] = None
    return used
