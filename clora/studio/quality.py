"""``clora studio check``: a built studio on held-out scenes, against its floors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from clora.data.generation import Generator
from clora.errors import CloraError
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.progress import say, stage
from clora.studio import baselines, evaluation
from clora.studio.assets import ASSETS, load_studio
from clora.studio.demo_config import GUIDANCE
from clora.studio.effects import EFFECTS
from clora.studio.judges import Judge
from clora.studio.pixels import to_images, to_tensor
from clora.studio.ranking import measure_judges
from clora.studio.teacher_files import load_teachers
from clora.studio.teachers import TEACHERS

FLOORS = {
    "vae_psnr": 30.0,
    "judge_accuracy": 0.99,
    "judge_auroc": 0.99,
    "second_opinion_auroc": 0.99,
    "teacher_accuracy": 0.9,
    "general_accuracy": 0.9,
}


def check(folder: Path | None = None, device: str = "auto") -> None:
    """Measures a built studio on held-out scenes and shows it against its floors.

    Raises:
        CloraError: a measured number is below its floor, or unknown device.
    """
    folder = folder or ASSETS
    adapter = load_studio(folder, device)
    loras = load_teachers(adapter, folder, TEACHERS)
    vae = adapter.pipeline.vae
    ranked, lines = measure_judges(
        evaluation.held_out_sources(4), EFFECTS, lambda images: round_trip(vae, images), device
    )
    measured = vae_quality(vae) | ranked | {"general_accuracy": general_quality(adapter)}
    num_rows = len(TEACHERS) * evaluation.NUM_SCENES
    with stage("teachers", num_rows * 2 * (baselines.TEACHER_STEPS + baselines.STEPS)) as advance:
        rows = baselines.measure_teachers(adapter, loras, advance)
    results = [(name, measured[name], floor) for name, floor in FLOORS.items() if name in measured]
    for effect, accuracy in rows["teachers_80"].row()["per_effect"].items():
        results.append((f"teacher {effect}", accuracy, FLOORS["teacher_accuracy"]))
    table = Table("measured", "value", "floor", title="studio, held-out scenes")
    for name, value, floor in results:
        table.add_row(name, f"{value:.3f}", f"{floor:.3f}", style="" if value >= floor else "red")
    Console().print(table)
    for line in lines:
        say(line)
    low = [name for name, value, floor in results if value < floor]
    if low:
        raise CloraError(f"below the floor: {', '.join(low)}; rebuild with `clora studio build`")


def vae_quality(vae) -> dict[str, float]:
    """Measures PSNR on held-out scenes and on effects, and the judges' accuracy on exact effects after a round trip."""
    sources = evaluation.held_out_sources(4)
    judges = [Judge.for_source(source, seed=100 + i) for i, source in enumerate(sources)]
    exact, names = [], []
    for name, effect in EFFECTS.items():
        # Draws apart from the judges' own.
        for i, source in enumerate(sources):
            exact.append(effect.apply(source, np.random.default_rng([i, 6])))
            names.append(name)
    decoded = round_trip(vae, np.stack(exact))
    accurate = [judges[i % len(judges)].score(decoded[i], name).accurate for i, name in enumerate(names)]
    scenes = evaluation.held_out_sources(48)
    return {
        "vae_psnr": mean_psnr(round_trip(vae, scenes), scenes),
        "vae_psnr_effects": mean_psnr(decoded, np.stack(exact)),
        "judge_accuracy": float(np.mean(accurate)),
    }


@torch.no_grad()
def round_trip(vae, images: np.ndarray) -> np.ndarray:
    """Encodes and decodes ``[N, 64, 64, 3]`` images in [0, 1]."""
    return to_images(vae.decode(vae.encode(to_tensor(images).to(vae.device)).latent_dist.mode()).sample)


def mean_psnr(images: np.ndarray, expected: np.ndarray) -> float:
    """PSNR in dB, averaged over the images."""
    mse = np.mean((images - expected) ** 2, axis=(1, 2, 3))
    return float(np.mean(-10 * np.log10(np.maximum(mse, 1e-10))))


def general_quality(adapter: Flux2KleinAdapter) -> float:
    """Measures the base's accuracy on held-out general edits, at 40 guided steps."""
    rows = baselines.general_rows(adapter)
    empty = adapter.encode_prompts([""])
    with stage("general edits", 2 * baselines.TEACHER_STEPS * evaluation.NUM_GENERAL) as advance:
        latents = Generator(adapter, report=advance).euler(*rows, baselines.TEACHER_STEPS, empty, GUIDANCE)
    return evaluation.general_accuracy(to_images(adapter.decode(latents)))
