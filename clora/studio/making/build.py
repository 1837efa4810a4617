"""Rebuilding the studio from seeds: stages that can run one by one, each recorded in ``provenance.json`` when done."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.numpy import save

from clora.devices import find_device
from clora.errors import CloraError, nearest
from clora.files import check_writable, write_atomic
from clora.hashing import file_digest
from clora.progress import stage, up_to
from clora.studio import text
from clora.studio.assets import ASSETS, PROVENANCE, SEED, load_studio, provenance, studio_adapter
from clora.studio.baselines import measure_baselines
from clora.studio.demo_config import DEFAULT_EFFECTS, GUIDANCE, demo_config
from clora.studio.making import base, teachers, text_training, vae
from clora.studio.making.pipelines import make_pipeline, save_pipeline
from clora.studio.quality import general_quality, vae_quality
from clora.studio.targets import TARGET_SOURCES, TARGETS, make_targets
from clora.studio.teacher_files import load_teachers, save_teacher
from clora.studio.teachers import SPECS, TEACHERS

VAE_UPDATES = 1800
TEXT_UPDATES = 400
BASE_SCENES = 4000
BASE_EDITS = 4  # of each scene
BASE_UPDATES = 4800

Made = tuple[dict[str, object], list[str]]
"""Measured numbers, and the files to hash."""


class Stage(NamedTuple):
    """One stage: ``make(folder, device)`` writes to the folder; the stages that it needs."""

    make: Callable[[Path, torch.device], Made]
    needs: tuple[str, ...]


def build(folder: Path | None = None, stages: Sequence[str] | None = None, device: str = "auto") -> None:
    """Builds the studio in ``folder`` (default: the package's own assets).

    Stages whose files and inputs are the recorded ones are passed over, unless named in ``stages``; a base that was
    cut off resumes from its last checkpoint, ``.base.safetensors``.

    Raises:
        CloraError: unknown stage or device, or the folder cannot be written.
    """
    target = find_device(device)
    folder = check_writable(folder or ASSETS)
    for name in stages or ():
        if name not in STAGES:
            raise CloraError(f"unknown stage {name!r}; the stages are {list(STAGES)}{nearest(name, STAGES)}")
    for name in stages or STAGES:
        # Checked in turn, since a stage that is made anew puts those after it out of date.
        if not stages and _is_done(folder, name):
            continue
        missing = [needed for needed in STAGES[name].needs if needed not in provenance(folder)]
        if missing:
            remedy = f"`clora studio build {folder} --stages {missing[0]}`"
            raise CloraError(f"stage {name!r} needs {missing} first: {remedy}")
        _make(folder, name, target)


def _is_done(folder: Path, name: str) -> bool:
    """A stage is done if it is recorded, its files are the recorded ones, and so are those it was made from."""
    entry = provenance(folder).get(name, {})
    files = entry.get("sha256", {})
    same = all((folder / file).exists() and file_digest(folder / file) == files[file] for file in files)
    return bool(files) and same and entry["inputs"] == _inputs(folder, name)


def _inputs(folder: Path, name: str) -> dict[str, str]:
    """Returns the hashes of the files that a stage is made from: those of the stages that it needs."""
    recorded = provenance(folder)
    hashes = {}
    for needed in STAGES[name].needs:
        hashes |= recorded.get(needed, {}).get("sha256", {})
    return hashes


def _make(folder: Path, name: str, device: torch.device) -> None:
    """Runs a stage and records it in the provenance."""
    import diffusers
    import transformers

    start = time.monotonic()
    measured, files = STAGES[name].make(folder, device)
    entry = {
        "command": f"clora studio build --stages {name}",
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
        "inputs": _inputs(folder, name),
        "sha256": {file: file_digest(folder / file) for file in files},
    }
    write_atomic(folder / PROVENANCE, json.dumps(provenance(folder) | {name: entry}, indent=2) + "\n")


def _vae_stage(folder: Path, device: torch.device) -> Made:
    with stage("autoencoder", VAE_UPDATES) as advance:
        model = vae.train_vae(VAE_UPDATES, SEED, device, lambda update, values: advance(1, psnr=values["psnr"]))
    model.half().save_pretrained(folder / "pipeline" / "vae")
    return vae_quality(model.float()), ["pipeline/vae/diffusion_pytorch_model.safetensors"]


def _text_stage(folder: Path, device: torch.device) -> Made:
    torch.manual_seed(SEED)
    tokenizer = text.train_tokenizer(text.prompt_corpus())
    encoder = text.make_text_encoder(len(tokenizer)).to(device)
    with stage("text encoder", TEXT_UPDATES) as advance:
        accuracy = text_training.train_text_encoder(encoder, tokenizer, TEXT_UPDATES, SEED, up_to(advance))
    tokenizer.save_pretrained(folder / "pipeline" / "tokenizer")
    encoder.save_pretrained(folder / "pipeline" / "text_encoder")
    files = ["pipeline/text_encoder/model.safetensors", "pipeline/tokenizer/tokenizer.json"]
    return {"reading_accuracy": accuracy}, files


def _base_stage(folder: Path, device: torch.device) -> Made:
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "pipeline" / "tokenizer")
    encoder = Qwen3ForCausalLM.from_pretrained(folder / "pipeline" / "text_encoder").eval()
    autoencoder = AutoencoderKLFlux2.from_pretrained(folder / "pipeline" / "vae").eval()
    pipeline = make_pipeline(autoencoder, encoder, tokenizer, base.make_transformer())
    adapter = studio_adapter(pipeline.to(device))
    with stage("training edits", BASE_SCENES) as advance:
        pool = base.make_pool(adapter, range(BASE_SCENES), BASE_EDITS, advance)
    checkpoint = folder / ".base.safetensors"
    with stage("base model", BASE_UPDATES) as advance:
        base.train_base(adapter, pool, BASE_UPDATES, SEED, checkpoint, up_to(advance))
    save_pipeline(pipeline, folder / "pipeline")
    checkpoint.unlink(missing_ok=True)
    measured = {"general_accuracy": general_quality(load_studio(folder, device))}
    return measured, ["pipeline/transformer/diffusion_pytorch_model.safetensors"]


def _teacher_stage(folder: Path, device: torch.device) -> Made:
    adapter = load_studio(folder, device)
    with stage(f"{len(SPECS)} teachers", teachers.UPDATES) as advance:
        trained = teachers.train_teachers(adapter, SPECS, SEED, up_to(advance))
    files = []
    for spec in SPECS:
        path = save_teacher(spec, trained[spec.effect], folder / "teachers")
        files += [path] if path.is_file() else sorted(path.iterdir())
    return {"pairs": teachers.PAIRS}, [str(file.relative_to(folder)) for file in files]


def _target_stage(folder: Path, device: torch.device) -> Made:
    adapter = load_studio(folder, device)
    made = make_targets(adapter, load_teachers(adapter, folder, TEACHERS), demo_config(TEACHERS, SEED))
    write_atomic(folder / TARGETS, made.serialise())
    return {"sources_per_effect": TARGET_SOURCES, "general": len(made.general)}, [TARGETS]


def _baseline_stage(folder: Path, device: torch.device) -> Made:
    adapter = load_studio(folder, device)
    loras = load_teachers(adapter, folder, TEACHERS)
    rows = measure_baselines(adapter, loras, DEFAULT_EFFECTS)
    images = {}
    for name, row in rows.items():
        images |= {f"{name}/{effect}": picture for effect, picture in row.pictures.items()}
    write_atomic(folder / "baselines.json", json.dumps({name: row.to_json() for name, row in rows.items()}) + "\n")
    write_atomic(folder / "baselines.safetensors", save(images))
    accuracy = rows["teachers_80"].row()["per_effect"]
    return {"teacher_accuracy": accuracy, "guidance": GUIDANCE}, ["baselines.json", "baselines.safetensors"]


STAGES = {
    "vae": Stage(_vae_stage, ()),
    "text": Stage(_text_stage, ()),
    "base": Stage(_base_stage, ("vae", "text")),
    "teachers": Stage(_teacher_stage, ("vae", "text", "base")),
    "targets": Stage(_target_stage, ("vae", "text", "base", "teachers")),
    "baselines": Stage(_baseline_stage, ("vae", "text", "base", "teachers")),
}
