"""``clora demo``: the studio's effects become one LoRA; a stock pipeline runs it and the judges measure the result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

from clora.collection.metadata import LORA_FILE
from clora.collection.write import check_output, make_collection, write_collection
from clora.commands.distill import training_bar
from clora.config.settings import DistillConfig
from clora.data.batches import DistillData
from clora.data.images import encode_png, fit
from clora.devices import find_device, peak_memory_gb
from clora.files import check_writable, write_atomic
from clora.lora.state import LoRAState
from clora.models.loading import load_pipeline
from clora.progress import say, stage
from clora.studio import assets, baselines, evaluation, targets
from clora.studio.baselines import grid_scene
from clora.studio.demo_config import DEFAULT_EFFECTS, STEPS, TEACHER_STEPS, demo_config
from clora.studio.demo_report import Shown, write_report
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import held_out_sources
from clora.studio.photographs import load_photographs
from clora.studio.pixels import to_bytes
from clora.studio.results import Measured
from clora.studio.scenes import SIZE
from clora.studio.targets import Targets
from clora.studio.teacher_files import load_teachers, teacher_path
from clora.studio.teachers import check_effects
from clora.training.student import first_student, train_student

SHOWN = ("chelsea", "windmill12", "brandenburg_gate", "kingfisher", "pika", "lemur", "mount_rushmore_2", "fish1")
"""Of the held-out photographs, the ones that the report shows."""
NOT_STATED = ("intervals", "outputs")  # in the collection


@dataclass
class Run:
    """The settings of a demo, with the times and curves gathered so far."""

    folder: Path
    config: DistillConfig
    precomputed_targets: bool = False
    threads: int | None = None  # of a training on a CPU
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


def run_demo(out: Path, seed: int, effects: Sequence[str] | None, full: bool, device: str = "auto") -> Path:
    """Distils the studio's teachers, exports, evaluates in a fresh stock pipeline and writes the report.

    Args:
        out: folder for ``report.html``, ``grid.png``, ``metrics.json``, ``held-out/`` with pictures and ``collection/``.
        seed: of the training.
        effects: some of the studio's teachers; the default eight for None.
        full: train as long as it takes and recompute what the studio ships.
        device: where everything runs (`clora.devices.find_device`).

    Returns:
        The path of the report.

    Raises:
        CloraError: unknown effect or device, or the folder cannot be written.
    """
    names = check_effects(effects or DEFAULT_EFFECTS)
    folder = assets.ASSETS
    config = demo_config(names, seed, full)
    run = Run(check_writable(out), config.model_copy(update={"device": str(find_device(device))}))
    if (check_output(run.folder / "collection") / LORA_FILE).exists():
        say(f"{run.folder} holds a finished demo, which this run replaces at its end; name another --out to keep it")
    with run.timed("load"), stage("load the studio", None):
        adapter = assets.load_studio(folder, run.config.device)
        loras = load_teachers(adapter, folder, names)
    with run.timed("targets"):
        shipped = None if full else shipped_targets(folder, names)
        run.precomputed_targets = shipped is not None
        data = targets.training_data(adapter, names, config, shipped or targets.make_targets(adapter, loras, config))
    # A row of results for each method: merges, teachers and base; at the end the collection.
    rows = None if full else shipped_rows(folder, names)
    with run.timed("train"):
        student = train(run, adapter, loras, data)
    with run.timed("export"), stage("export", None):
        files = {name: teacher_path(folder, name) for name in names}
        licenses = dict.fromkeys(names, "Apache-2.0")
        description = make_collection(run.config, adapter, assets.BASE_MODEL, files, licenses)
        collection = write_collection(student, description, run.folder / "collection", torch.float16)
    if rows is None:
        with run.timed("baselines"):
            rows = baselines.measure_baselines(adapter, loras)
    with run.timed("evaluate"):
        rows["clora"], gallery = evaluate_collection(run.config, folder, collection)
    save_held_out(run.folder, run.config.data.size)
    # The same weights again, now with the measured values in their metadata.
    metrics = {
        name: value for name, value in rows["clora"].row().items() if value is not None and name not in NOT_STATED
    }
    measured = description.model_copy(update={"metrics": metrics})
    write_collection(student, measured, collection, torch.float16)
    return _report(run, rows, gallery, folder, collection)


def held_out_photographs(size: tuple[int, int]) -> list[Image.Image]:
    """Returns photographs that no training has seen, cropped around their centres, in ``size`` (height, width)."""
    photographs = load_photographs()
    return [fit(Image.fromarray(photographs.background("held_out", name)), size).image for name in SHOWN]


def save_held_out(folder: Path, size: tuple[int, int]) -> None:
    """Writes the photographs of the report as ``held-out/0.png``, ..., for a user's own calls."""
    for index, picture in enumerate(held_out_photographs(size)):
        write_atomic(folder / "held-out" / f"{index}.png", encode_png(np.asarray(picture)))


def shipped_targets(folder: Path, names: Sequence[str]) -> Targets | None:
    """Reads the targets that the studio ships; None where it lacks those of an effect.

    Raises:
        CloraError: a shipped file is not the one that was built.
    """
    made = targets.load_targets(folder)
    return made if set(names) <= made.effects.keys() else None


def train(run: Run, adapter, loras, data: DistillData) -> LoRAState:
    """Trains the student under a progress bar and returns its LoRA."""
    start = first_student(run.config, adapter, loras, data)
    with training_bar(f"distil {len(loras)} effects", run.config.train) as show:

        def report(update: int, values: Mapping[str, float]) -> None:
            if run.config.device == "cpu":
                run.threads = torch.get_num_threads()  # those that the training has taken
            for name, value in values.items():
                run.curves.setdefault(name, []).append((update, value))
            show(update, values)

        student = train_student(run.config, adapter, dict(loras), data, report, start=start)
    return student


def shipped_rows(folder: Path, names: Sequence[str]) -> dict[str, Measured] | None:
    """Reads the rows that do not depend on the student, as the studio ships them; None for other effects than its own.

    Raises:
        CloraError: a shipped file is not the one that was built.
    """
    if set(names) != set(DEFAULT_EFFECTS):
        return None
    stored = json.loads(assets.verified(folder, "baselines.json").read_text())
    images = load_file(assets.verified(folder, "baselines.safetensors"))
    return {
        method: Measured.from_json(row, {name: images[f"{method}/{name}"] for name in names})
        for method, row in stored.items()
    }


def evaluate_collection(config: DistillConfig, folder: Path, collection: Path) -> tuple[Measured, list[Shown]]:
    """Loads the collection into a fresh stock pipeline; measures it, and makes pictures as its users would.

    The outputs that are judged are made in batches, by the sampler that the stock pipeline's own call equals: it takes one
    picture a call.

    Returns:
        Its row of the table, and a picture of each effect by the pipeline's own call.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = load_pipeline(str(folder / "pipeline"), config.device)
    pipe.load_lora_weights(collection)
    # In fp32 merged weights lose nothing, and a pass costs what the base's does. They are not restored, which PEFT would do
    # with other bits: this pipeline has no other use.
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # PEFT's layers around them
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(collection / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    names = [effect.name for effect in config.effects]
    adapter = assets.studio_adapter(pipe)
    rows = baselines.EvaluationSet.encode(adapter, names)
    general = baselines.general_rows(adapter, evaluation.NUM_GENERAL)
    text = adapter.encode_prompts([effect.student_prompts[0] for effect in config.effects])
    with stage("evaluate", (len(rows.ids) + evaluation.NUM_GENERAL) * STEPS) as advance:
        measured = baselines.measure_one_lora(None, rows, text, general, advance)
    photographs = held_out_photographs(config.data.size)
    gallery = []
    for index, effect in enumerate(config.effects):
        source = np.asarray(photographs[index % len(photographs)])
        result = stock_edit(pipe, config, source / 255, effect.student_prompts[0], seed=index)
        gallery.append(Shown(effect.name, EFFECTS[effect.name].prompt, source, to_bytes(result)))
    return measured, gallery


def stock_edit(pipe, config: DistillConfig, image: np.ndarray, prompt: str, seed: int) -> np.ndarray:
    """Edits one picture by the stock pipeline's own call: ``[H, W, 3]`` in [0, 1], of ``config.data.size``, to the same."""
    # As users call it: the pipeline draws its noise from the global generator.
    torch.manual_seed(seed)
    result = pipe(
        image=Image.fromarray(to_bytes(image)),
        prompt=prompt,
        num_inference_steps=config.sampler.steps,
        guidance_scale=1.0,
        height=config.data.size[0],
        width=config.data.size[1],
        max_sequence_length=config.data.max_sequence_length,
        output_type="np",
    )
    return result.images[0]


def _report(run: Run, rows: Mapping[str, Measured], gallery: Sequence[Shown], folder: Path, collection: Path) -> Path:
    """Prints the accuracies and writes the report."""
    names = [effect.name for effect in run.config.effects]
    sizes = _sizes(names, rows, folder, collection)
    measured = {method: row.row() for method, row in rows.items()}
    device = run.config.device
    metrics = {
        "seed": run.config.seed,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": run.threads,
        "dtype": run.config.dtype,
        "updates": run.config.train.updates,
        "targets_precomputed": run.precomputed_targets,
        "seconds": run.seconds,
        "peak_memory_gb": round(peak_memory_gb(torch.device(device)), 2),
        "effects": names,
        "rows": [
            {"method": method, "precomputed": row.precomputed, **sizes[method], **measured[method]}
            for method, row in rows.items()
        ],
        "against_teachers": rows["clora"].difference(rows["teachers_80"]),
        "against_base": {"general_accuracy": rows["clora"].difference(rows["base"])["general_accuracy"]},
    }
    accuracy = {method: values["effect_accuracy"] for method, values in measured.items()}
    # The merge that a user would choose, by the measured accuracy.
    best = max((method for method in rows if method.startswith("merge")), key=lambda method: accuracy[method])
    print(
        f"effect accuracy on held-out scenes: clora {accuracy['clora']:.1%}; one LoRA each, 80 passes: "
        f"{accuracy['teachers_80']:.1%}, 8 passes: {accuracy['teachers_8']:.1%}; best merge {accuracy[best]:.1%}"
    )
    columns, images = _grid(names, rows, best)
    train = run.config.train
    phases = (("anchoring", round(train.anchor_share * train.updates)), ("matching", train.updates))
    return write_report(run.folder, metrics, gallery, columns, images, run.curves, phases)


def _sizes(
    names: Sequence[str], rows: Mapping[str, Measured], folder: Path, collection: Path
) -> dict[str, dict[str, float]]:
    """Returns the files to keep, their megabytes, and the passes for a picture, by method."""

    def megabytes(path: Path) -> float:
        files = [path] if path.is_file() else path.rglob("*.safetensors")
        return sum(file.stat().st_size for file in files) / 1e6

    # A user of single LoRAs keeps one file for each effect.
    many = sum(megabytes(teacher_path(folder, name)) for name in names)
    merges = {name: {"files": 1, "megabytes": rows[name].megabytes, "nfe": STEPS} for name in baselines.MERGES}
    return merges | {
        "teachers_80": {"files": len(names), "megabytes": round(many, 2), "nfe": 2 * TEACHER_STEPS},
        "teachers_8": {"files": len(names), "megabytes": round(many, 2), "nfe": STEPS},
        "base": {"files": 0, "megabytes": 0.0, "nfe": STEPS},
        "clora": {"files": 1, "megabytes": round(megabytes(collection), 2), "nfe": STEPS},
    }


def _grid(names: Sequence[str], rows: Mapping[str, Measured], best: str) -> tuple[Sequence[str], np.ndarray]:
    """One scene of each effect, by every method: titles, and images ``[E, C, H, W, 3]``."""
    columns = ("source", "exact effect", "teacher, 80 passes", "teacher, 8 passes", "best merge", "clora, 8 passes")
    images = []
    for name in names:
        source = held_out_sources(evaluation.NUM_SCENES, SIZE)[grid_scene(name)]
        exact = EFFECTS[name].apply(source, np.random.default_rng(0))
        results = [rows[method].pictures[name] / 255 for method in ("teachers_80", "teachers_8", best, "clora")]
        images.append(np.stack([source, exact, *results]))
    return columns, np.stack(images)
