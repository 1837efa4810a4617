"""The studio's shipped files: the pipeline, the teachers, and what was computed once from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from clora.config.settings import make_trigger
from clora.errors import CloraError
from clora.studio.effects import EFFECTS

ASSETS = Path(__file__).parent / "assets"
PROVENANCE = "provenance.json"
TARGETS = "targets.safetensors"


def assets_folder() -> Path:
    """The folder of the shipped studio. Raises CloraError where it is incomplete."""
    if not (ASSETS / "pipeline" / "model_index.json").exists():
        raise CloraError(f"expected the studio in {ASSETS}, found it incomplete; run `clora studio build` or reinstall")
    return ASSETS


def pipeline_folder() -> Path:
    """The folder that ``DiffusionPipeline.from_pretrained`` takes."""
    return assets_folder() / "pipeline"


def provenance(folder: Path) -> dict:
    """Stage name to what its build recorded: seconds, seeds, versions, measured numbers, hashes of its files.

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


def student_prompts(effect: str) -> tuple[str, ...]:
    """How the student is asked for an effect: its trigger with a description, in three phrasings."""
    trigger, library = make_trigger(effect), EFFECTS[effect]
    return (f"{trigger} {library.description}", f"{trigger} {library.prompt}", f"{library.description} {trigger}")


@dataclass(frozen=True)
class Targets:
    """Rendered targets: ``latents [E, M, T, C]`` of each effect's sources, ``general [P, T, C]`` of general pairs."""

    effects: tuple[str, ...]
    latents: Tensor
    general: Tensor

    def tensors(self) -> dict[str, np.ndarray]:
        """The file's tensors in fp16: one for each effect under its name, and the general pairs'."""
        rows = {f"effect.{name}": latents for name, latents in zip(self.effects, self.latents, strict=True)}
        return {name: tensor.half().cpu().numpy() for name, tensor in (rows | {"general": self.general}).items()}

    def of(self, effects: Sequence[str]) -> Tensor:
        return torch.stack([self.latents[self.effects.index(effect)] for effect in effects])


def load_targets(folder: Path) -> Targets:
    """Reads the shipped targets, verified against the hash in the provenance."""
    tensors = {name: torch.from_numpy(array).float() for name, array in load_file(verified(folder, TARGETS)).items()}
    general = tensors.pop("general")
    effects = tuple(name.removeprefix("effect.") for name in tensors)
    return Targets(effects, torch.stack(list(tensors.values())), general)


def verified(folder: Path, name: str) -> Path:
    """A shipped file whose hash is the recorded one.

    Raises:
        CloraError: the file is missing or differs.
    """
    recorded = {n: h for stage in provenance(folder).values() for n, h in stage.get("sha256", {}).items()}
    path = folder / name
    if not path.exists() or recorded.get(name) != sha256(path):
        raise CloraError(f"{path} is missing or not the file that the build recorded; use --full or rebuild the studio")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
