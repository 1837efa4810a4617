"""Rebuilding the studio from seeds: stages that can run one by one, each recorded in ``provenance.json`` when done."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from safetensors.numpy import save

from clora.devices import find_device
from clora.errors import CloraError, nearest
from clora.files import check_writable, write_atomic
from clora.hashing import file_digest
from clora.progress import stage, up_to
from clora.studio import targets
from clora.studio.assets import PROVENANCE, SEED, load_studio, provenance
from clora.studio.baselines import measure_baselines
from clora.studio.demo_config import DEFAULT_EFFECTS, demo_config
from clora.studio.making import base, teachers, vae
from clora.studio.making.pipelines import make_pipeline, save_pipeline
from clora.studio.making.text_training import train_text_encoder
from clora.studio.photographs import PHOTOGRAPHS, TABLE, Photographs, load_photographs
from clora.studio.precision import ReducedAdapter
from clora.studio.quality import base_quality, teacher_quality, teacher_table, vae_quality
from clora.studio.teacher_files import load_teachers, save_teacher
from clora.studio.teachers import PAIRS, SPECS
from clora.studio.text import make_text_encoder, prompt_corpus, train_tokenizer

VAE_UPDATES = 4000
TEXT_UPDATES = 900
MEASURED = {64: 24, 128: 6}
"""Held-out scenes that teachers are measured on, by the side of their pictures."""

Made = tuple[dict[str, object], list[str]]
"""Measured numbers, and the files to hash."""


class Stage(NamedTuple):
    """One stage: ``make(folder, device, photographs)`` writes to the folder; the stages that it needs."""

    make: Callable[[Path, torch.device, Photographs], Made]
    needs: tuple[str, ...]


def build(folder: Path, stages: Sequence[str] | None = None, device: str = "auto", photos: Path | None = None) -> None:
    """Builds the studio in ``folder`` from a folder of photographs (default: those that ship).

    Stages whose files and inputs are the recorded ones are passed over, unless named in ``stages``; an autoencoder, a base
    or teachers that were cut off resume from their last checkpoint, such as ``.base-0.safetensors``.

    Raises:
        CloraError: unknown stage or device, or the folder cannot be written.
    """
    target = find_device(device)
    photographs = load_photographs(photos or PHOTOGRAPHS)
    folder = check_writable(folder)
    for name in stages or ():
        if name not in STAGES:
            raise CloraError(f"unknown stage {name!r}; the stages are {list(STAGES)}{nearest(name, STAGES)}")
    for name in stages or STAGES:
        # Checked in turn, since a stage that is made anew puts those after it out of date.
        if not stages and _is_done(folder, name, photographs):
            continue
        missing = [needed for needed in STAGES[name].needs if needed not in provenance(folder)]
        if missing:
            remedy = f"name {missing[0]} in --stages, too"
            raise CloraError(f"stage {name!r} needs {missing} first; {remedy}")
        _make(folder, name, target, photographs)


def _is_done(folder: Path, name: str, photographs: Photographs) -> bool:
    """A stage is done if it is recorded, its files are the recorded ones, and so are those it was made from."""
    entry = provenance(folder).get(name, {})
    files = entry.get("sha256", {})
    same = all((folder / file).exists() and file_digest(folder / file) == files[file] for file in files)
    return bool(files) and same and entry["inputs"] == _inputs(folder, name, photographs)


def _inputs(folder: Path, name: str, photographs: Photographs) -> dict[str, str]:
    """Returns the hashes of the files that a stage is made from: those of the stages that it needs, and the table of photographs."""
    recorded = provenance(folder)
    hashes = {TABLE: file_digest(photographs.folder / TABLE)}
    for needed in STAGES[name].needs:
        hashes |= recorded.get(needed, {}).get("sha256", {})
    return hashes


def _make(folder: Path, name: str, device: torch.device, photographs: Photographs) -> None:
    """Runs a stage and records it in the provenance."""
    import diffusers
    import transformers

    start = time.monotonic()
    measured, files = STAGES[name].make(folder, device, photographs)
    entry = {
        "command": f"clora studio build DIR --stages {name}",
        "seed": SEED,
        "seconds": round(time.monotonic() - start, 1),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "measured": measured,
        "inputs": _inputs(folder, name, photographs),
        "sha256": {file: file_digest(folder / file) for file in files},
    }
    write_atomic(folder / PROVENANCE, json.dumps(provenance(folder) | {name: entry}, indent=2) + "\n")
    # Not before: what was trained is measured for minutes, and a stop there must not cost the training.
    for checkpoint in folder.glob(f".{name}*.safetensors"):
        checkpoint.unlink()


def _vae_stage(folder: Path, device: torch.device, photographs: Photographs) -> Made:
    checkpoint = folder / ".vae.safetensors"
    with stage("autoencoder", VAE_UPDATES) as advance:
        model = vae.train_vae(VAE_UPDATES, SEED, checkpoint, photographs, device, up_to(advance))
    model.half().save_pretrained(folder / "pipeline" / "vae")
    return vae_quality(model.float()), ["pipeline/vae/diffusion_pytorch_model.safetensors"]


def _text_stage(folder: Path, device: torch.device, photographs: Photographs) -> Made:
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(prompt_corpus(photographs=photographs))
    encoder = make_text_encoder(len(tokenizer)).to(device)
    with stage("text encoder", TEXT_UPDATES) as advance:
        accuracy = train_text_encoder(encoder, tokenizer, TEXT_UPDATES, SEED, up_to(advance), photographs)
    tokenizer.save_pretrained(folder / "pipeline" / "tokenizer")
    encoder.save_pretrained(folder / "pipeline" / "text_encoder")
    files = ["pipeline/text_encoder/model.safetensors", "pipeline/tokenizer/tokenizer.json"]
    return {"reading_accuracy": accuracy}, files


def _base_stage(folder: Path, device: torch.device, photographs: Photographs) -> Made:
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "pipeline" / "tokenizer")
    encoder = Qwen3ForCausalLM.from_pretrained(folder / "pipeline" / "text_encoder").eval()
    autoencoder = AutoencoderKLFlux2.from_pretrained(folder / "pipeline" / "vae").eval()
    pipeline = make_pipeline(autoencoder, encoder, tokenizer, base.make_transformer())
    pipeline.to(device)
    for number, phase in enumerate(base.PHASES):
        # Other draws in each phase. A phase that is done is read from its checkpoint.
        file, seed = folder / f".base-{number}.safetensors", SEED + 1000 * number
        with stage(f"base model, part {number + 1} of {len(base.PHASES)}", phase.updates) as advance:
            base.train_base(pipeline, phase, seed, file, photographs, up_to(advance))
    save_pipeline(pipeline, folder / "pipeline")
    pipeline = load_studio(folder, device).pipeline
    measured = {str(size): base_quality(ReducedAdapter(pipeline, size)) for size in base.ROWS}
    return measured, ["pipeline/transformer/diffusion_pytorch_model.safetensors"]


def _teacher_stage(name: str, folder: Path, device: torch.device, photographs: Photographs) -> Made:
    specs = TEACHER_STAGES[name]
    pipeline = load_studio(folder, device).pipeline
    # Other first weights and draws in every group.
    seed = 1000 * SEED + list(TEACHER_STAGES).index(name)
    with stage(f"{name}: {len(specs)} teachers", teachers.UPDATES) as advance:
        trained = teachers.train_group(
            pipeline, specs, seed, folder / f".{name}.safetensors", photographs, up_to(advance)
        )
    files = []
    for spec in specs:
        path = save_teacher(spec, trained[spec.effect], folder / "teachers")
        files += [path] if path.is_file() else sorted(path.iterdir())
    measured: dict[str, object] = {"pairs": PAIRS}
    for size, scenes in MEASURED.items():
        # As they were written, in 16 bits.
        adapter = ReducedAdapter(pipeline, size)
        quality = teacher_quality(adapter, load_teachers(adapter, folder, [spec.effect for spec in specs]), scenes)
        Console().print(teacher_table(quality, size))
        measured[str(size)] = {effect: asdict(found) for effect, found in quality.items()}
    return measured, [str(file.relative_to(folder)) for file in files]


def _target_stage(folder: Path, device: torch.device, photographs: Photographs) -> Made:
    adapter = load_studio(folder, device)
    loras = load_teachers(adapter, folder, DEFAULT_EFFECTS)
    made = targets.make_targets(adapter, loras, demo_config(DEFAULT_EFFECTS, SEED))
    write_atomic(folder / targets.TARGETS, made.serialise())
    return {"sources_per_effect": targets.TARGET_SOURCES, "general": len(made.general)}, [targets.TARGETS]


def _baseline_stage(folder: Path, device: torch.device, photographs: Photographs) -> Made:
    adapter = load_studio(folder, device)
    rows = measure_baselines(adapter, load_teachers(adapter, folder, DEFAULT_EFFECTS))
    images = {f"{name}/{effect}": picture for name, row in rows.items() for effect, picture in row.pictures.items()}
    write_atomic(folder / "baselines.json", json.dumps({name: row.to_json() for name, row in rows.items()}) + "\n")
    write_atomic(folder / "baselines.safetensors", save(images))
    return {name: row.row() for name, row in rows.items()}, ["baselines.json", "baselines.safetensors"]


TEACHER_STAGES = {f"teachers-{number}": group for number, group in enumerate(teachers.groups(SPECS), start=1)}
_BASE = ("vae", "text", "base")
_OF_THE_DEMO = tuple(
    name for name, group in TEACHER_STAGES.items() if any(spec.effect in DEFAULT_EFFECTS for spec in group)
)
STAGES = {
    "vae": Stage(_vae_stage, ()),
    "text": Stage(_text_stage, ()),
    "base": Stage(_base_stage, ("vae", "text")),
    **{name: Stage(partial(_teacher_stage, name), _BASE) for name in TEACHER_STAGES},
    "targets": Stage(_target_stage, (*_BASE, *_OF_THE_DEMO)),
    "baselines": Stage(_baseline_stage, (*_BASE, *_OF_THE_DEMO)),
}
