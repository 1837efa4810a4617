"""The studio's files: where they are, what their build recorded of them, and the pipeline that they hold."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from clora.errors import CloraError
from clora.hashing import file_digest
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.models.loading import load_pipeline
from clora.studio.scenes import SIZE
from clora.studio.text import MAX_SEQUENCE_LENGTH

ASSETS = Path(__file__).parent / "assets"  # the shipped studio
BASE_MODEL = "clora-studio-2"  # as collections name the shipped pipeline; the first one was a studio of shapes
PROVENANCE = "provenance.json"
SEED = 0  # of every stage of the build


def pipeline_folder(studio: Path = ASSETS) -> Path:
    """Returns the folder that ``DiffusionPipeline.from_pretrained`` takes. Raises CloraError where it is missing."""
    folder = studio / "pipeline"
    # Without this check, diffusers would look for the folder's name on the model hub.
    if not (folder / "model_index.json").exists():
        raise CloraError(
            f"expected a studio in {studio}, found no pipeline in it; run `clora studio build {studio}` or reinstall clora"
        )
    return folder


def load_studio(folder: Path, device: str | torch.device = "auto") -> Flux2KleinAdapter:
    """Loads a built studio's pipeline. Raises CloraError where it is missing or cannot be loaded."""
    return studio_adapter(load_pipeline(str(pipeline_folder(folder)), str(device)))


def studio_adapter(pipeline, size: int = SIZE) -> Flux2KleinAdapter:
    """Wraps a pipeline for pictures of ``size x size`` pixels."""
    return Flux2KleinAdapter(pipeline, (size, size), MAX_SEQUENCE_LENGTH)


def provenance(folder: Path) -> dict:
    """Maps each stage to the record of its build: seconds, seeds, versions, measured numbers, hashes of its files.

    Raises:
        CloraError: it cannot be read.
    """
    path = folder / PROVENANCE
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CloraError(
            f"{path} cannot be read ({error}); restore it, or remove it and build the studio anew"
        ) from error


def verified(folder: Path, name: str) -> Path:
    """Returns the path of a shipped file whose hash is the recorded one.

    Raises:
        CloraError: the file is missing or differs.
    """
    path = folder / name
    recorded = {}
    for stage in provenance(folder).values():
        recorded |= stage.get("sha256", {})
    if not path.exists() or recorded.get(name) != file_digest(path):
        raise CloraError(f"{path} is missing or not the file that the build recorded; use --full or rebuild the studio")
    return path
