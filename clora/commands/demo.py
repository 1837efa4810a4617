"""``clora demo``: the studio's effects become one LoRA; a stock pipeline runs it and the judges measure the result."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

from clora.collection.metadata import LORA_FILE
from clora.collection.write import check_output, make_collection, write_collection
from clora.commands.distill import training_bar
from clora.config.settings import DistillConfig
from clora.data.batches import DistillData, EffectSamples
from clora.data.images import encode_png
from clora.devices import find_device
from clora.errors import CloraError, nearest
from clora.files import check_writable, write_atomic
from clora.lora.state import LoRAState
from clora.models.conditioning import Text
from clora.models.loading import load_pipeline
from clora.progress import say, stage
from clora.studio import assets, baselines, evaluation, targets
from clora.studio.baselines import Measured, grid_pictures, grid_scene
from clora.studio.demo_config import DEFAULT_EFFECTS, demo_config
from clora.studio.demo_report import Shown, write_report
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import general_accuracy, general_cases, held_out_sources, judge_effects
from clora.studio.judges import Verdict
from clora.studio.pixels import to_bytes
from clora.studio.teacher_files import load_teachers, teacher_path
from clora.studio.teachers import TEACHERS
from clora.threads import idle_threads
from clora.training.student import first_student, train_student

# 496 updates reached an effect accuracy of 70 %, 861 of 86 %.
ENOUGH_UPDATES = 700


@dataclass
class Run:
    """The settings of a demo, with the times and curves gathered so far."""

    folder: Path
    config: DistillConfig
    full: bool
    threads: int | None = None  # of a training on a CPU
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)

    @property
    def updates(self) -> int:
        """The updates that were made: as many as fitted into the time."""
        return self.curves["loss"][-1][0]

    @property
    def warning(self) -> str | None:
        """Explains poor effects, where the time held too few updates."""
        if self.full or self.updates >= ENOUGH_UPDATES:
            return None
        idle = idle_threads(torch.get_num_threads())
        few = self.threads is not None and self.threads < idle
        used = f" on {self.threads} of {idle} threads" if few else ""
        return (
            f"only {self.updates} updates fitted into the time{used}, where two idle cores make about 860: expect poor "
            "effects. Run it again with less running beside it, or with --full"
        )


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
    config = demo_config(names, seed, None) if full else demo_config(names, seed)
    run = Run(check_writable(out), config.model_copy(update={"device": str(find_device(device))}), full)
    if (check_output(run.folder / "collection") / LORA_FILE).exists():
        say(f"{run.folder} holds a finished demo, which this run replaces at its end; name another --out to keep it")
    with run.timed("load"), stage("load the studio", None):
        adapter = assets.load_studio(folder, run.config.device)
        loras = load_teachers(adapter, folder, names)
    with run.timed("targets"):
        data = demo_data(adapter, loras, run.config, folder, recompute=full)
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
            rows = baselines.measure_baselines(adapter, loras, list(loras))
    with run.timed("evaluate"):
        outputs, general = run_collection(run.config, folder / "pipeline", collection)
        with stage("judge", len(outputs)) as advance:
            rows["clora"] = Measured(grid_pictures(outputs), judge_effects(outputs, advance), general)
    save_held_out(run.folder)
    # The same weights again, now with the measured values in their metadata.
    metrics = {name: value for name, value in rows["clora"].row().items() if value is not None}
    measured = description.model_copy(update={"metrics": metrics})
    write_collection(student, measured, collection, torch.float16)
    return _report(run, rows, folder, collection)


def save_held_out(folder: Path) -> None:
    """Writes the scenes that a demo is judged on as ``held-out/0.png``, ..., for a user's own calls."""
    for index, scene in enumerate(held_out_sources(evaluation.NUM_SCENES)):
        write_atomic(folder / "held-out" / f"{index}.png", encode_png(to_bytes(scene)))


def check_effects(names: Sequence[str]) -> list[str]:
    """Returns each name once. Raises CloraError with the nearest name where the studio has no teacher."""
    known = list(TEACHERS)
    for name in names:
        if name not in known:
            raise CloraError(f"unknown effect {name!r}; the studio has teachers for {known}{nearest(name, known)}")
    return list(dict.fromkeys(names))


def demo_data(adapter, loras, config: DistillConfig, folder: Path, recompute: bool) -> DistillData:
    """Encodes the training data of the chosen effects; targets are the shipped ones unless recomputed."""
    made = targets.make_targets(adapter, loras, config) if recompute else targets.load_targets(folder)
    with stage("encode scenes and prompts", None):
        sources = targets.target_sources(adapter)
        general_sources, general_text = targets.general_pairs(adapter, len(made.general))
        teacher = adapter.encode_prompts([effect.prompt for effect in config.effects])
        student = adapter.encode_prompts(list(chain.from_iterable(effect.student_prompts for effect in config.effects)))
    # The table of prompts is these four parts, one after the other; each gets its rows of it.
    parts = [teacher, student, general_text, adapter.encode_prompts([""])]
    teacher_rows, student_rows, general_rows, empty_row = torch.arange(sum(map(len, parts))).split([*map(len, parts)])
    phrasings = student_rows.split([len(effect.student_prompts) for effect in config.effects])
    samples = [
        EffectSamples(name, sources, made.effects[name], row, asked[:, None], empty_row)
        for name, row, asked in zip(loras, teacher_rows[:, None], phrasings, strict=True)
    ]
    pairs = torch.stack([torch.arange(len(general_rows)), general_rows, empty_row.expand_as(general_rows)], 1)
    return DistillData.of(Text.cat(parts), samples, general_sources, pairs, made.general)


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
    if run.warning is not None:
        say(run.warning)
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
    rows = {}
    for method, row in stored.items():
        rows[method] = Measured(
            pictures={name: images[f"{method}/{name}"] for name in names},
            verdicts={name: [Verdict(**values) for values in row["verdicts"][name]] for name in names},
            general=row["general"],
            megabytes=row["megabytes"],
            precomputed=True,
        )
    return rows


def run_collection(config: DistillConfig, pipeline_folder: Path, collection: Path):
    """Loads the collection into a fresh stock pipeline and runs it on the held-out scenes, as its users would.

    Returns:
        Effect name to outputs ``[N, 64, 64, 3]``, and the general accuracy.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = load_pipeline(str(pipeline_folder), config.device)
    pipe.load_lora_weights(collection)
    # In fp32 merged weights lose nothing, and a pass costs what the base's does. They are not restored, which PEFT would do
    # with other bits: this pipeline has no other use.
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # PEFT's layers around them
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(collection / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    sources = held_out_sources(evaluation.NUM_SCENES)
    cases = general_cases(evaluation.NUM_GENERAL)
    with stage("evaluate", len(config.effects) * len(sources) + len(cases)) as advance:

        def edit(image: np.ndarray, prompt: str, seed: int) -> np.ndarray:
            advance(1)
            return stock_edit(pipe, config, image, prompt, seed)

        # Seeds do not depend on the run: 100 for the scenes of each effect, 9000 and up for general edits.
        outputs = {}
        for i, effect in enumerate(config.effects):
            prompt = effect.student_prompts[0]
            outputs[effect.name] = np.stack([edit(source, prompt, 100 * i + j) for j, source in enumerate(sources)])
        general = general_accuracy([edit(c.source, c.edit.instruction, 9000 + i) for i, c in enumerate(cases)])
    return outputs, general


def stock_edit(pipe, config: DistillConfig, image: np.ndarray, prompt: str, seed: int) -> np.ndarray:
    """Edits one picture by the stock pipeline's own call: ``[64, 64, 3]`` in and out."""
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


def _report(run: Run, rows: Mapping[str, Measured], folder: Path, collection: Path) -> Path:
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
        "updates": run.updates,
        "warning": run.warning,
        "targets_precomputed": not run.full,
        "seconds": run.seconds,
        "peak_rss_mb": _peak_megabytes(),
        "effects": names,
        "rows": [
            {"method": method, "precomputed": row.precomputed, **sizes[method], **measured[method]}
            for method, row in rows.items()
        ],
    }
    accuracy = {method: values["effect_accuracy"] for method, values in measured.items()}
    # The merge that a user would choose, by the measured accuracy.
    best = max((method for method in rows if method.startswith("merge")), key=lambda method: accuracy[method])
    print(
        f"effect accuracy on held-out scenes: clora {accuracy['clora']:.1%}; one LoRA each, 80 passes: "
        f"{accuracy['teachers_80']:.1%}, 8 passes: {accuracy['teachers_8']:.1%}; best merge {accuracy[best]:.1%}"
    )
    sources = held_out_sources(evaluation.NUM_SCENES)
    gallery = [
        Shown(name, EFFECTS[name].prompt, to_bytes(sources[grid_scene(name)]), rows["clora"].pictures[name])
        for name in names
    ]
    columns, images = _grid(names, rows, best)
    return write_report(run.folder, metrics, gallery, columns, images, run.curves)


def _peak_megabytes() -> int | None:
    """Returns the process's peak memory; None where the system does not report it (Windows)."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def _sizes(
    names: Sequence[str], rows: Mapping[str, Measured], folder: Path, collection: Path
) -> dict[str, dict[str, float]]:
    """Files a user keeps, their megabytes, and passes per picture, by method."""

    def megabytes(path: Path) -> float:
        files = [path] if path.is_file() else path.rglob("*.safetensors")
        return sum(file.stat().st_size for file in files) / 1e6

    # A user of single LoRAs keeps one file for each effect.
    many = sum(megabytes(teacher_path(folder, name)) for name in names)
    merges = {name: {"files": 1, "megabytes": rows[name].megabytes, "nfe": 8} for name in baselines.MERGES}
    return merges | {
        "teachers_80": {"files": len(names), "megabytes": round(many, 2), "nfe": 80},
        "teachers_8": {"files": len(names), "megabytes": round(many, 2), "nfe": 8},
        "base": {"files": 0, "megabytes": 0.0, "nfe": 8},
        "clora": {"files": 1, "megabytes": round(megabytes(collection), 2), "nfe": 8},
    }


def _grid(names: Sequence[str], rows: Mapping[str, Measured], best: str) -> tuple[Sequence[str], np.ndarray]:
    """One scene of each effect, by every method: titles, and images ``[E, C, H, W, 3]``."""
    columns = ("source", "exact effect", "teacher, 80 passes", "teacher, 8 passes", "best merge", "clora, 8 passes")
    images = []
    for name in names:
        source = held_out_sources(evaluation.NUM_SCENES)[grid_scene(name)]
        exact = EFFECTS[name].apply(source, np.random.default_rng(0))
        results = [rows[method].pictures[name] / 255 for method in ("teachers_80", "teachers_8", best, "clora")]
        images.append(np.stack([source, exact, *results]))
    return columns, np.stack(images)
