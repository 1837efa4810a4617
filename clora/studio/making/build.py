"""Rebuilding the studio from seeds: stages that can be run alone, each recorded in ``provenance.json`` when done."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save

from clora.config.settings import DistillConfig
from clora.data.generation import Generator
from clora.data.rendering import Samples, num_passes, render_general_targets, render_targets
from clora.devices import find_device
from clora.errors import CloraError, nearest
from clora.files import check_writable, write_atomic
from clora.models.conditioning import Text
from clora.models.loading import load_pipeline
from clora.progress import stage, up_to
from clora.studio import baselines, text
from clora.studio.assets import ASSETS, PROVENANCE, TARGETS, Targets, assets_folder, provenance, sha256, to_bytes
from clora.studio.demo_config import DEFAULT_EFFECTS, GUIDANCE, demo_config
from clora.studio.edits import sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import FIRST_HELD_OUT, general_accuracy, general_cases, held_out_sources
from clora.studio.judges import Judge
from clora.studio.making import base, teachers, text_training, vae
from clora.studio.scenes import make_scene, render

SEED = 0
VAE_UPDATES = 1800
TEXT_UPDATES = 400
BASE_SCENES, BASE_EDITS, BASE_UPDATES = 4000, 4, 4800
TARGET_SOURCES = 40
FIRST_TARGET_SCENE, FIRST_GENERAL_SCENE = 300_000_000, 400_000_000
EVALUATION_SCENES, EVALUATION_GENERAL = 8, 54
FLOORS = {"vae_psnr": 30.0, "judge_accuracy": 0.99, "teacher_accuracy": 0.9, "general_accuracy": 0.9}


Stage = Callable[[Path, torch.device], tuple[dict[str, object], list[str]]]
"""``stage(folder, device)`` writes to the folder and returns measured numbers and the files to hash."""


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
        if not stages and _is_done(folder, name):  # asked in turn: a stage made anew puts those after it out of date
            continue
        _check_inputs(folder, name)
        start = time.monotonic()
        measured, files = STAGES[name](folder, target)
        _record(folder, name, time.monotonic() - start, target, measured, files)


def _check_inputs(folder: Path, name: str) -> None:
    missing = [needed for needed in NEEDS[name] if needed not in provenance(folder)]
    if missing:
        raise CloraError(f"stage {name!r} needs {missing} first: `clora studio build {folder} --stages {missing[0]}`")


def _is_done(folder: Path, name: str) -> bool:
    """Whether a stage is recorded, its files are the recorded ones, and so is what it was made from."""
    entry = provenance(folder).get(name, {})
    files = entry.get("sha256", {})
    same = all((folder / file).exists() and sha256(folder / file) == files[file] for file in files)
    return bool(files) and same and entry["inputs"] == _inputs(folder, name)


def _inputs(folder: Path, name: str) -> dict[str, str]:
    """Hashes of the files that a stage is made from: those of the stages it needs."""
    recorded = provenance(folder)
    return {f: h for needed in NEEDS[name] for f, h in recorded.get(needed, {}).get("sha256", {}).items()}


def check(folder: Path | None = None, device: str = "auto") -> None:
    """Measures a built studio on held-out scenes and shows it against its floors.

    Raises:
        CloraError: a measured number is below its floor, or unknown device.
    """
    folder = folder or assets_folder()
    adapter = studio(folder, device)
    names = [spec.effect for spec in teachers.SPECS]
    loras = teachers.load_teachers(adapter, folder / "teachers", names)
    evaluation = baselines.EvaluationSet.encode(adapter, names, EVALUATION_SCENES, EVALUATION_GENERAL)
    measured = vae_quality(adapter.pipeline.vae) | {"general_accuracy": general_quality(adapter)}
    with stage("teachers", len(evaluation.ids) * 2 * (baselines.TEACHER_STEPS + baselines.STEPS)) as advance:
        rows = baselines.measure_teachers(adapter, loras, evaluation, GUIDANCE, advance)
    accuracies = rows["teachers_80"].row()["per_effect"]
    results = [(name, measured[name], floor) for name, floor in FLOORS.items() if name in measured]
    results += [(f"teacher {name}", value, FLOORS["teacher_accuracy"]) for name, value in accuracies.items()]
    _show(results)
    low = [name for name, value, floor in results if value < floor]
    if low:
        raise CloraError(f"below the floor: {', '.join(low)}; rebuild with `clora studio build`")


def _show(results: list[tuple[str, float, float]]) -> None:
    table = Table("measured", "value", "floor", title="studio, held-out scenes")
    for name, value, floor in results:
        table.add_row(name, f"{value:.3f}", f"{floor:.3f}", style="" if value >= floor else "red")
    Console().print(table)


def _record(
    folder: Path, name: str, seconds: float, device: torch.device, measured: dict[str, object], files: list[str]
) -> None:
    import diffusers
    import transformers

    entry = {
        "command": f"clora studio build --stages {name}",
        "seed": SEED,
        "seconds": round(seconds, 1),
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
        "sha256": {file: sha256(folder / file) for file in files},
    }
    write_atomic(folder / PROVENANCE, json.dumps(provenance(folder) | {name: entry}, indent=2) + "\n")


def _vae_stage(folder: Path, device: torch.device) -> tuple[dict[str, object], list[str]]:
    with stage("autoencoder", VAE_UPDATES) as advance:
        model = vae.train_vae(VAE_UPDATES, SEED, device, lambda update, values: advance(1, psnr=values["psnr"]))
    model.half().save_pretrained(folder / "pipeline" / "vae")
    return vae_quality(model.float()), ["pipeline/vae/diffusion_pytorch_model.safetensors"]


def vae_quality(model) -> dict[str, float]:
    """Held-out PSNR of scenes and of effects, and the judges' accuracy on exact effects after a round trip."""
    sources = held_out_sources(4)
    draws = {n: [e.apply(s, np.random.default_rng([i, 6])) for i, s in enumerate(sources)] for n, e in EFFECTS.items()}
    exact = np.stack([image for row in draws.values() for image in row])
    with torch.no_grad():
        latents = [model.encode(chunk).latent_dist.mode() for chunk in vae.to_tensor(exact).to(model.device).split(32)]
        decoded = np.concatenate([vae.to_images(model.decode(z).sample) for z in latents])
    judges = [Judge.for_source(source, seed=100 + i) for i, source in enumerate(sources)]
    names = [name for name in EFFECTS for _ in sources]
    verdicts = [
        judges[i % len(sources)].score(image, name) for i, (image, name) in enumerate(zip(decoded, names, strict=True))
    ]
    scenes = np.stack([render(make_scene(FIRST_HELD_OUT + i)) for i in range(48)])
    return {
        "vae_psnr": vae.reconstruction_psnr(model, scenes),
        "vae_psnr_effects": vae.reconstruction_psnr(model, exact),
        "judge_accuracy": float(np.mean([v.accurate for v in verdicts])),
    }


def _text_stage(folder: Path, device: torch.device) -> tuple[dict[str, object], list[str]]:
    torch.manual_seed(SEED)
    tokenizer = text.train_tokenizer(text.prompt_corpus())
    encoder = text.make_text_encoder(len(tokenizer)).to(device)
    with stage("text encoder", TEXT_UPDATES) as advance:
        accuracy = text_training.train_text_encoder(
            encoder, tokenizer, TEXT_UPDATES, SEED, lambda update, values: advance(1, **values)
        )
    tokenizer.save_pretrained(folder / "pipeline" / "tokenizer")
    encoder.save_pretrained(folder / "pipeline" / "text_encoder")
    files = ["pipeline/text_encoder/model.safetensors", "pipeline/tokenizer/tokenizer.json"]
    return {"reading_accuracy": accuracy}, files


def _base_stage(folder: Path, device: torch.device) -> tuple[dict[str, object], list[str]]:
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "pipeline" / "tokenizer")
    encoder = Qwen3ForCausalLM.from_pretrained(folder / "pipeline" / "text_encoder").eval()
    autoencoder = AutoencoderKLFlux2.from_pretrained(folder / "pipeline" / "vae").eval()
    pipeline = base.make_pipeline(autoencoder, encoder, tokenizer, base.make_transformer())
    adapter = base.studio_adapter(pipeline.to(device))
    with stage("training edits", BASE_SCENES) as advance:
        pool = base.make_pool(adapter, range(BASE_SCENES), BASE_EDITS, advance)
    checkpoint = folder / ".base.safetensors"
    with stage("base model", BASE_UPDATES) as advance:
        base.train_base(adapter, pool, BASE_UPDATES, SEED, checkpoint, up_to(advance))
    save_pipeline(pipeline, folder / "pipeline")
    checkpoint.unlink(missing_ok=True)
    adapter = studio(folder, device)
    measured = {"general_accuracy": general_quality(adapter)}
    return measured, ["pipeline/transformer/diffusion_pytorch_model.safetensors"]


def save_pipeline(pipeline, folder: Path) -> None:
    """Saves the pipeline with fp16 weights, which diffusers loads as fp32; transformers would keep fp16."""
    for component in (pipeline.transformer, pipeline.vae):
        component.half()
    pipeline.save_pretrained(folder)
    for config in folder.rglob("*.json"):  # diffusers writes where the parts were loaded from
        values = json.loads(config.read_text())
        if values.pop("_name_or_path", None) is not None:
            write_atomic(config, json.dumps(values, indent=2) + "\n")


def studio(folder: Path, device: str | torch.device = "auto"):
    """The adapter of a built studio. Raises CloraError where it is missing or cannot be loaded."""
    if not (folder / "pipeline" / "model_index.json").exists():  # else its name would be asked of the model hub
        raise CloraError(f"expected a studio in {folder}, found no pipeline in it; `clora studio build {folder}`")
    return base.studio_adapter(load_pipeline(str(folder / "pipeline"), str(device)))


def general_quality(adapter) -> float:
    """Accuracy of the base on held-out general edits, 40 guided steps."""
    evaluation = baselines.EvaluationSet.encode(adapter, DEFAULT_EFFECTS[:1], 1, EVALUATION_GENERAL)
    count = len(general_cases(EVALUATION_GENERAL))
    passes = 2 * baselines.TEACHER_STEPS * count
    with stage("general edits", passes) as advance:
        generator = Generator(adapter, None, None, baselines.SHIFT, report=advance)
        latents = generator.guided_euler(
            torch.zeros(count, dtype=torch.int64),
            evaluation.general,
            evaluation.empty_text,
            [8_000_000 + i for i in range(count)],
            baselines.TEACHER_STEPS,
            GUIDANCE,
        )
    return general_accuracy(vae.to_images(adapter.decode(latents)))


def _teacher_stage(folder: Path, device: torch.device) -> tuple[dict[str, object], list[str]]:
    adapter = studio(folder, device)
    with stage(f"{len(teachers.SPECS)} teachers", teachers.UPDATES) as advance:
        trained = teachers.train_teachers(adapter, teachers.SPECS, SEED, up_to(advance))
    paths = [teachers.save_teacher(spec, trained[spec.effect], folder / "teachers") for spec in teachers.SPECS]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    return {"pairs": teachers.PAIRS}, [str(file.relative_to(folder)) for file in files]


def scene_latents(adapter, seeds: Sequence[int]) -> torch.Tensor:
    """Encoded scenes ``[M, T, C]``."""
    return adapter.encode_images(vae.to_tensor(np.stack([render(make_scene(seed)) for seed in seeds])))


def _target_stage(folder: Path, device: torch.device) -> tuple[dict[str, object], list[str]]:
    adapter = studio(folder, device)
    names = [spec.effect for spec in teachers.SPECS]
    config = demo_config(names, SEED)
    made = make_targets(adapter, teachers.load_teachers(adapter, folder / "teachers", names), config)
    write_atomic(folder / TARGETS, save(made.tensors()))
    return {"sources_per_effect": TARGET_SOURCES, "general": len(made.general)}, [TARGETS]


def make_targets(adapter, loras, config: DistillConfig) -> Targets:
    """Every teacher's render of the distillation's sources, and the base's of its general pairs.

    They are the same for every seed of a training.
    """
    names, config = list(loras), config.model_copy(update={"seed": SEED})
    num_effects, num_general = len(names), config.data.general_targets
    prompts = adapter.encode_prompts([EFFECTS[name].prompt for name in names])
    general_sources, instructions = general_pairs(adapter, num_general)
    text = Text.cat([prompts, instructions, adapter.encode_prompts([""])])
    sources = target_sources(adapter).expand(num_effects, -1, -1, -1)
    rows, empty = torch.arange(num_effects + num_general), torch.tensor(num_effects + num_general)
    effects = Samples(sources, *torch.broadcast_tensors(rows[:num_effects, None], empty.expand(TARGET_SOURCES)))
    general = Samples(general_sources, rows[num_effects:], empty.expand(num_general))
    with stage("render targets", num_passes(config, effects.prompt.numel() + num_general)) as advance:
        latents = render_targets(adapter, loras, effects, text, config, advance)
        return Targets(tuple(names), latents, render_general_targets(adapter, general, text, config, advance))


def target_sources(adapter) -> torch.Tensor:
    """The distillation's sources ``[M, T, C]``, the same scenes for every effect."""
    return scene_latents(adapter, [FIRST_TARGET_SCENE + i for i in range(TARGET_SOURCES)])


def general_pairs(adapter, count: int) -> tuple[torch.Tensor, Text]:
    """The first ``count`` sources ``[P, T, C]`` and their instructions of the general stream."""
    seeds, rng = [FIRST_GENERAL_SCENE + i for i in range(count)], np.random.default_rng([SEED, 7])
    instructions = [sample_edit(make_scene(seed), rng).instruction for seed in seeds]
    return scene_latents(adapter, seeds), adapter.encode_prompts(instructions)


def _baseline_stage(folder: Path, device: torch.device) -> tuple[dict[str, object], list[str]]:
    adapter = studio(folder, device)
    every = [spec.effect for spec in teachers.SPECS]
    loras = teachers.load_teachers(adapter, folder / "teachers", every)
    rows, images = {}, {}
    for name, measured in measure_baselines(adapter, loras, list(DEFAULT_EFFECTS)).items():
        rows[name] = measured.to_json()
        images |= {
            f"{name}/{effect}": to_bytes(outputs[grid_scene(effect)]) for effect, outputs in measured.outputs.items()
        }
    write_atomic(folder / "baselines.json", json.dumps(rows) + "\n")
    write_atomic(folder / "baselines.safetensors", save(images))
    measured = {
        effect: float(np.mean([v["accurate"] for v in verdicts]))
        for effect, verdicts in rows["teachers_80"]["verdicts"].items()
    }
    return {"teacher_accuracy": measured, "guidance": GUIDANCE}, ["baselines.json", "baselines.safetensors"]


def grid_scene(effect: str) -> int:
    """Which held-out scene shows an effect in the grid of pictures."""
    return [spec.effect for spec in teachers.SPECS].index(effect) % EVALUATION_SCENES


def measure_baselines(adapter, loras, merged: list[str]) -> dict[str, baselines.Measured]:
    """All rows that do not depend on the student; the merges are of the effects ``merged``."""
    evaluation = baselines.EvaluationSet.encode(adapter, list(loras), EVALUATION_SCENES, EVALUATION_GENERAL)
    few = baselines.EvaluationSet.encode(adapter, merged, EVALUATION_SCENES, EVALUATION_GENERAL)
    n = len(evaluation.ids)
    m = len(few.ids) + EVALUATION_GENERAL
    passes = (
        n * (2 * baselines.TEACHER_STEPS + 2 * baselines.STEPS) + (3 * len(baselines.MERGES) + 1) * m * baselines.STEPS
    )
    with stage("baselines", passes) as advance:
        rows = baselines.measure_teachers(adapter, loras, evaluation, GUIDANCE, advance)
        rows |= baselines.measure_merges(adapter, {e: loras[e] for e in merged}, few, advance)
        rows["base"] = baselines.measure_one_lora(adapter, None, few, few.student_text, advance)
    return rows


NEEDS = {
    "vae": (),
    "text": (),
    "base": ("vae", "text"),
    "teachers": ("vae", "text", "base"),
    "targets": ("vae", "text", "base", "teachers"),
    "baselines": ("vae", "text", "base", "teachers"),
}
STAGES: dict[str, Stage] = {
    "vae": _vae_stage,
    "text": _text_stage,
    "base": _base_stage,
    "teachers": _teacher_stage,
    "targets": _target_stage,
    "baselines": _baseline_stage,
}
