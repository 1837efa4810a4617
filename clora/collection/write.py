"""The collection: one folder that stock diffusers loads, with scheduler, prompts, provenance and a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from clora.collection.apply import call_arguments, loads_lora_weights, pipeline_class
from clora.collection.hub import is_repo_id
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
from clora.lora.save import check_storable, save_diffusers_lora
from clora.lora.source import content_hash
from clora.lora.state import LoRAState
from clora.version import __version__

# What belongs to a collection, as patterns; and what is uploaded.
COLLECTION_FILES = ("README.md", LORA_FILE, "scheduler/*")
UPLOADED_FILES = (*COLLECTION_FILES, SAMPLES_FILE)
CARD_MARK = "Distilled with clora"  # in every model card
SHARED_SETTINGS = {"student", "sampler", "objective", "train", "seed"}  # no paths of the machine
# Licences that the Hub knows by these names; it takes any other as "other" with a name.
_HUB_LICENSE = re.compile(
    r"apache-2\.0|mit|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-4\.0|openrail(\+\+)?|creativeml-openrail-m|[al]?gpl-3\.0|bsd-3-clause"
)


def make_collection(
    config: DistillConfig,
    pipeline: str,
    call: Mapping[str, float],
    base_model: str,
    loras: Mapping[str, Path],
    licenses: Mapping[str, str | None],
    base_revision: str | None = None,
) -> Collection:
    """What a collection says about itself.

    Args:
        config: of the distillation.
        pipeline: class name of the pipeline.
        call: what the family needs in a call (`clora.models.ModelAdapter.student_call`).
        base_model: its hub id, or what a local one is called.
        loras: effect name to its teacher's file or folder, which is hashed.
        licenses: effect name to its teacher's licence, None where it is not known.
        base_revision: commit of the base model on the Hub.

    Raises:
        CloraError: a teacher's file cannot be read.
    """
    own_prompts = config.objective.orthogonal_prompting
    effects = tuple(
        CollectedEffect(
            name=effect.name,
            prompts=effect.student_prompts if own_prompts else (effect.prompt,),
            teacher=loras[effect.name].name,
            teacher_sha256=content_hash(loras[effect.name]),
            trigger=effect.trigger if own_prompts else None,
            license=licenses[effect.name],
        )
        for effect in config.effects
    )
    return Collection(
        version=__version__,
        pipeline=pipeline,
        base_model=base_model,
        base_revision=base_revision,
        effects=effects,
        sampling=Sampling(
            steps=config.sampler.steps,
            shift=config.sampler.shift,
            size=config.data.size,
            max_sequence_length=config.data.max_sequence_length,
            call=dict(call),
        ),
        scheduler=scheduler_config(config.sampler.shift),
        provenance=config.model_dump(mode="json", include=SHARED_SETTINGS),
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


def export_collection(
    student: LoRAState,
    collection: Collection,
    folder: Path,
    dtype: torch.dtype,
    hub_id: str | None = None,
    samples: bytes | None = None,
) -> Path:
    """Writes the folder; returns it.

    ``pytorch_lora_weights.safetensors`` has keys ``transformer.X.lora_A/B.weight``, uniform rank and alpha = rank, so
    that diffusers of any version and ComfyUI read it alike, and `clora.collection.metadata.read_collection` gives the
    collection back; ``scheduler/`` yields the student's timesteps whatever shift the pipeline passes. All of it is read
    back and compared, and the weights come last: a folder that has them is complete.

    Args:
        student: what was trained.
        collection: what the folder says about it.
        folder: created where missing.
        dtype: stored type.
        hub_id: where it will be on the Hub, for the model card.
        samples: a PNG for the model card (`clora.collection.samples.draw_samples`); None leaves or makes a folder without.

    Raises:
        CloraError: the folder cannot be written, a weight is not finite, or something is not read back as it was meant.
    """
    check_output(folder)
    check_storable(student, folder / LORA_FILE, dtype)
    metadata = to_metadata(collection)
    _write_samples(folder / SAMPLES_FILE, samples)
    write_atomic(folder / "README.md", model_card(collection, hub_id, samples is not None))
    _save_scheduler(collection, folder / "scheduler")
    save_diffusers_lora(student, folder / LORA_FILE, dtype=dtype, metadata=metadata)
    return folder


def name_repository(folder: Path, hub_id: str) -> None:
    """Lets the model card of a finished collection say where it will be on the Hub; one that was edited is left as it is.

    Raises:
        CloraError: no collection is there, or the card cannot be written.
    """
    collection, card = read_collection(folder), folder / "README.md"
    has_samples = (folder / SAMPLES_FILE).exists()
    if card.read_text("utf-8", errors="replace") == model_card(collection, has_samples=has_samples):
        write_atomic(card, model_card(collection, hub_id, has_samples))


def _write_samples(file: Path, samples: bytes | None) -> None:
    """Those of a collection that is replaced go."""
    if samples is None:
        file.unlink(missing_ok=True)
    else:
        write_atomic(file, samples)


def student_scheduler(shift: float):
    """diffusers' scheduler that is the few-step sampler: static shift, fresh noise at every step."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)


def scheduler_config(shift: float) -> dict[str, object]:
    """The config of `student_scheduler`."""
    return json.loads(student_scheduler(shift).to_json_string())


def _save_scheduler(collection: Collection, folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(collection.scheduler)
    try:
        scheduler.save_pretrained(folder)
        if FlowMatchEulerDiscreteScheduler.from_pretrained(folder).config != scheduler.config:
            raise OSError("the config read back differs from what was written")
    except OSError as error:
        raise CloraError(f"{folder} cannot be written: {error}") from error


def model_card(collection: Collection, hub_id: str | None = None, has_samples: bool = False) -> str:
    """The folder's README: what it is, samples, how to call it in diffusers and ComfyUI, effects, prompts, licences, metrics."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("clora"), keep_trailing_newline=True, trim_blocks=True)
    environment.filters["cell"] = lambda text: " ".join(text.split()).replace("|", "\\|")
    environment.filters["repr"] = repr
    return environment.get_template("model_card.md.j2").render(
        collection=collection,
        front_matter=_front_matter(collection),
        mark=CARD_MARK,
        location=hub_id or "path/to/this/folder",
        loads_lora_weights=loads_lora_weights(pipeline_class(collection)),
        file=LORA_FILE,
        samples=SAMPLES_FILE if has_samples else None,
        is_on_hub=is_repo_id(collection.base_model),
        call={"prompt": collection.effects[0].prompts[0], **call_arguments(collection)},
        metrics=_metric_rows(collection),
    )


def _front_matter(collection: Collection) -> dict[str, object]:
    """What the Hub reads; it refuses a base model without an owner and a licence that it does not know."""
    base = {"base_model": collection.base_model, "base_model_relation": "adapter"}
    return {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        **(base if is_repo_id(collection.base_model) else {}),
        **_common_license(collection),
        "tags": ["diffusers", "lora", "template:sd-lora", "image-to-image", "image-editing", "clora"],
    }


def _common_license(collection: Collection) -> dict[str, str]:
    """The teachers' licence where all have the same."""
    found = {(effect.license or "").strip().lower() for effect in collection.effects}
    name = found.pop() if len(found) == 1 else ""
    if not name:
        return {}
    if _HUB_LICENSE.fullmatch(name):
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", name).strip("-")}


def _metric_rows(collection: Collection) -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    for name, value in collection.metrics.items():
        rows += [(f"{name}, {of}", x) for of, x in value.items()] if isinstance(value, dict) else [(name, value)]
    return rows
