"""The collection: one folder that stock diffusers loads, with scheduler, prompts, provenance and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from clora.atomic import check_writable, write_atomic
from clora.config import DistillConfig
from clora.errors import CloraError
from clora.lora.save import check_storable, save_diffusers_lora
from clora.lora.source import content_hash
from clora.lora.state import LoRAState

LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_MARK = "Distilled with clora"  # in every model card
SHARED_SETTINGS = {"student", "sampler", "objective", "train", "seed"}  # no paths of the machine


@dataclass(frozen=True)
class CollectedEffect:
    """One effect of a collection, as its user asks for it.

    Attributes:
        name: the effect.
        prompts: the student's prompts, the first is the one to use.
        teacher: file name of the teacher it was distilled from.
        teacher_sha256: hash of that file.
        license: the teacher's licence where its file says so.
    """

    name: str
    prompts: tuple[str, ...]
    teacher: str
    teacher_sha256: str
    license: str | None = None


@dataclass(frozen=True)
class Collection:
    """What is written beside the weights.

    Attributes:
        effects: the effects.
        base_model: hub id of the pipeline, or the name of its folder.
        steps: passes of the few-step sampler.
        shift: its time shift.
        max_sequence_length: text tokens that the pipeline must be called with.
        size: height and width it was trained at.
        provenance: anything else worth keeping (versions, seed, config), JSON values.
        call: other keyword arguments that the pipeline must be called with (`ModelAdapter.student_call`).
    """

    effects: Sequence[CollectedEffect]
    base_model: str
    steps: int
    shift: float
    max_sequence_length: int
    size: tuple[int, int]
    provenance: Mapping[str, object]
    call: Mapping[str, float] = field(default_factory=lambda: {"guidance_scale": 1.0})


def make_collection(
    config: DistillConfig, base_model: str, loras: Mapping[str, Path], licenses: Mapping[str, str | None]
) -> Collection:
    """What a collection says about itself.

    Args:
        config: of the distillation.
        base_model: hub id of the pipeline, or the name of its folder.
        loras: effect name to its teacher's file or folder, which is hashed.
        licenses: effect name to its teacher's licence, None where it is not known.

    Raises:
        CloraError: a teacher's file cannot be read.
    """
    from clora import __version__

    effects = [
        CollectedEffect(
            effect.name,
            effect.student_prompts if config.objective.orthogonal_prompting else (effect.prompt,),
            loras[effect.name].name,
            content_hash(loras[effect.name]),
            licenses[effect.name],
        )
        for effect in config.effects
    ]
    return Collection(
        effects=effects,
        base_model=base_model,
        steps=config.sampler.steps,
        shift=config.sampler.shift,
        max_sequence_length=config.data.max_sequence_length,
        size=config.data.size,
        provenance={"clora": __version__} | config.model_dump(mode="json", include=SHARED_SETTINGS),
    )


def check_output(folder: str | Path) -> Path:
    """Makes sure, before long work starts, that a collection can be written there.

    Raises:
        CloraError: the folder cannot be written, or holds a README.md that is not a collection's.
    """
    path = check_writable(folder)
    check_writable(path / "scheduler")
    card = path / "README.md"
    if card.is_file() and CARD_MARK not in card.read_text("utf-8", errors="replace"):
        raise CloraError(f"output folder {path} holds another README.md; choose an empty or a new folder")
    return path


def export_collection(student: LoRAState, collection: Collection, folder: Path, dtype: torch.dtype) -> Path:
    """Writes the folder; returns it.

    ``pytorch_lora_weights.safetensors`` has keys ``transformer.X.lora_A/B.weight``, uniform rank and alpha = rank, so
    that diffusers of any version, ComfyUI and sglang read it alike; ``scheduler/`` yields the student's timesteps
    whatever shift the pipeline passes. The weights come last: a folder that has them is complete.

    Raises:
        CloraError: the folder cannot be written, or a weight is not finite.
    """
    check_output(folder)
    check_storable(student, folder / LORA_FILE, dtype)
    write_atomic(folder / "README.md", model_card(collection))
    try:
        student_scheduler(collection.shift).save_pretrained(folder / "scheduler")
    except OSError as error:
        raise CloraError(f"{folder / 'scheduler'} cannot be written: {error}") from error
    metadata = {
        "clora.effects": json.dumps([asdict(effect) for effect in collection.effects]),
        "clora.sampling": json.dumps(
            {
                "steps": collection.steps,
                "shift": collection.shift,
                **collection.call,
                "max_sequence_length": collection.max_sequence_length,
                "size": list(collection.size),
            }
        ),
        "clora.base_model": collection.base_model,
        "clora.provenance": json.dumps(dict(collection.provenance), default=str),
    }
    save_diffusers_lora(student, folder / LORA_FILE, dtype=dtype, metadata=metadata)
    return folder


def student_scheduler(shift: float):
    """diffusers' scheduler that is the few-step sampler: static shift, fresh noise at every step."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)


def model_card(collection: Collection) -> str:
    """The folder's README: what it is, how to call it in diffusers and ComfyUI, effects, prompts and licences."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("clora"), keep_trailing_newline=True, trim_blocks=True)
    environment.filters["cell"] = lambda text: " ".join(text.split()).replace("|", "\\|")
    return environment.get_template("model_card.md.j2").render(
        collection=collection, mark=CARD_MARK, prompt=repr(collection.effects[0].prompts[0])
    )
