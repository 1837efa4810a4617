"""``clora studio example``: a folder with all that ``clora distill`` needs to make one LoRA of the studio's teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile

import numpy as np
import yaml

from clora.data.images import encode_png
from clora.errors import CloraError
from clora.files import check_writable, write_atomic
from clora.studio.assets import ASSETS, pipeline_folder
from clora.studio.demo_config import GUIDANCE, SHIFT, STEPS, TEACHER_STEPS, student_prompts
from clora.studio.edits import FAMILIES, sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.photographs import PHOTOGRAPHS
from clora.studio.pixels import to_bytes
from clora.studio.scenes import make_scene, render
from clora.studio.teacher_files import teacher_path
from clora.studio.teachers import TEACHERS, check_effects
from clora.studio.text import MAX_SEQUENCE_LENGTH

CONFIG = "distill.yaml"
SIZE = 128
NUM_IMAGES = 40
FIRST_SCENE = 500_000_000
EDITS_PER_FAMILY = 3
HEADER = """\
# One LoRA of the studio's teachers: clora distill {folder}/distill.yaml
# ATTRIBUTION.md names the authors and licences of the photographs that the pictures are made of.
"""


def write_example(folder: Path, studio: Path | None = None, effects: Sequence[str] | None = None) -> Path:
    """Writes a config, pictures to edit with their attribution, and general instructions; returns the config's path.

    Args:
        folder: new, or without a config.
        studio: a built studio, whose pipeline and teachers the config names; None for the one that ships.
        effects: some of its teachers; None for all.

    Raises:
        CloraError: unknown effect, a teacher is missing, the folder holds a config already, or it cannot be written.
    """
    studio = studio or ASSETS
    names = check_effects(effects or TEACHERS)
    for name in names:
        if not teacher_path(studio, name).exists():
            raise CloraError(f"{studio} holds no teacher of {name!r}; run the stages `teachers-1`, ... of its build")
    folder = check_writable(folder)
    path = folder / CONFIG
    if path.exists():
        raise CloraError(f"{path} exists; name another folder, or remove the file to write it anew")
    for i in range(NUM_IMAGES):
        picture = render(make_scene(FIRST_SCENE + i, "train"), SIZE)
        write_atomic(folder / "images" / f"{i:02d}.png", encode_png(to_bytes(picture)))
    copyfile(PHOTOGRAPHS / "ATTRIBUTION.md", folder / "ATTRIBUTION.md")
    write_atomic(folder / "edits.txt", "\n".join(general_edits()) + "\n")
    text = yaml.safe_dump(example_config(names, studio), sort_keys=False, width=120)
    write_atomic(path, HEADER.format(folder=folder) + text)
    return path


def general_edits() -> list[str]:
    """Returns instructions of general edits that any picture allows."""
    rng = np.random.default_rng(0)
    scene = make_scene(FIRST_SCENE, "train")
    names = [name for name, family in FAMILIES.items() if not family.of_objects]
    drawn = [sample_edit(scene, rng, name).instruction for name in names for _ in range(EDITS_PER_FAMILY)]
    return list(dict.fromkeys(drawn))


def example_config(names: Sequence[str], studio: Path) -> dict[str, object]:
    """Returns the settings that distil some of a studio's teachers, as a config file states them."""
    return {
        "pipeline": str(pipeline_folder(studio)),
        "output": "collection",
        "effects": [
            {
                "name": name,
                "lora": str(teacher_path(studio, name)),
                "prompt": EFFECTS[name].prompt,
                "student_prompts": list(student_prompts(name)),
            }
            for name in names
        ],
        "data": {
            "sources": "images",
            "size": [SIZE, SIZE],
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "general_instructions": "edits.txt",
            "general_targets": 128,
            "held_out": 4,
            "cache": "cache",
        },
        "student": {"rank": 64, "init": "least_squares"},
        "sampler": {"steps": STEPS, "shift": SHIFT, "teacher_steps": TEACHER_STEPS, "guidance": GUIDANCE},
        "train": {
            "updates": 60 * len(names),
            "anchor_share": 0.9,
            "optimizer": "muon",
            "anchor_learning_rate": 4e-3,
            "learning_rate": 5e-4,
            "critic_learning_rate": 6e-4,
            "critic_ratio": 1,
            "batch_size": 8,
        },
    }
