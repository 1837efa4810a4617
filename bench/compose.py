"""Two effects in one picture, on the studio: one composed call against two calls in a row, paired.

`python -m bench.compose train` trains one student per seed as `clora demo` does; `python -m bench.compose` measures all of them and writes ``bench/results/studio/compose.json``.

An output counts as right if the exact result of one effect after the other, in any order, is nearer to it than the unchanged
picture, every single effect of the library and every other pair (`clora.studio.judges.features`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

import clora
from bench.arguments import RESULTS, Parser, new_folder, run, whole
from clora.collection.write import make_collection, write_collection
from clora.commands.demo import stock_edit
from clora.commands.distill import training_bar
from clora.config.settings import DistillConfig
from clora.errors import CloraError
from clora.files import write_atomic
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.models.loading import load_pipeline
from clora.progress import stage
from clora.studio import assets, targets
from clora.studio.demo_config import DEFAULT_EFFECTS, demo_config
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import held_out_sources
from clora.studio.judges import features
from clora.studio.pixels import to_images, to_tensor
from clora.studio.scenes import SIZE
from clora.studio.teacher_files import load_teachers, teacher_path
from clora.training.student import first_student, train_student

SEEDS = (0, 1, 2)
NUM_SCENES = 6
DRAWS = 8  # exact results of a pair with a stochastic effect
ONE_CALL_TOKENS = 128  # the studio takes 64, which no composed prompt fits
PAIRS = tuple(permutations(DEFAULT_EFFECTS, 2))
Pair = tuple[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = Parser("bench.compose", __doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", choices=("measure", "train"), default="measure")
    parser.add_argument("--folder", type=new_folder, default="compose", help="where the students are")
    parser.add_argument("--updates", type=whole(), help="of each student; by default those of the demo")
    parser.add_argument("--seeds", type=whole(0, 2**31 - 1), nargs="+", default=list(SEEDS))
    parser.add_out(RESULTS / "studio")
    arguments = parser.parse_args(argv)
    if arguments.action == "train":
        folders = [new_folder(arguments.folder / f"seed{seed}") for seed in arguments.seeds]
        for folder, seed in zip(folders, arguments.seeds, strict=True):
            train(folder, seed, arguments.updates)
    else:
        out = parser.out(arguments, "folder", "seeds")
        result = measure(arguments.folder, arguments.seeds)
        write_atomic(out / "compose.json", json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))
    return 0


def train(folder: Path, seed: int, updates: int | None) -> None:
    """Trains the student of one seed, or goes on from its checkpoint, and writes its collection."""
    config = demo_config(DEFAULT_EFFECTS, seed)
    if updates is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"updates": updates})})
    adapter = assets.load_studio(assets.ASSETS, "cpu")
    loras = load_teachers(adapter, assets.ASSETS, DEFAULT_EFFECTS)
    data = targets.training_data(adapter, DEFAULT_EFFECTS, config, targets.load_targets(assets.ASSETS))
    start = first_student(config, adapter, loras, data)
    with training_bar(f"seed {seed}", config.train) as report:
        student = train_student(config, adapter, dict(loras), data, report, start=start)
    files = {name: teacher_path(assets.ASSETS, name) for name in loras}
    about = make_collection(config, adapter, assets.BASE_MODEL, files, dict.fromkeys(loras, "Apache-2.0"))
    write_collection(student, about, folder, torch.float16)


def measure(folder: Path, seeds: Sequence[int]) -> dict[str, object]:
    """Measures the students of all seeds.

    Raises:
        CloraError: there is no student of a seed.
    """
    if missing := [seed for seed in seeds if not (folder / f"seed{seed}").is_dir()]:
        wanted = f"expected a folder seed{missing[0]} with its student in {folder}, found none"
        raise CloraError(f"{wanted}; run python -m bench.compose train --seeds {' '.join(map(str, missing))}")
    judges = [PairJudge.of(source, i) for i, source in enumerate(held_out_sources(NUM_SCENES, SIZE))]
    start = time.monotonic()
    found: dict[str, list[list[Verdict]]] = {}
    with stage("two effects", len(seeds) * len(PAIRS) * NUM_SCENES) as advance:
        for seed in seeds:
            config = demo_config(DEFAULT_EFFECTS, seed)
            methods = Methods(config, folder / f"seed{seed}")
            verdicts: dict[str, list[Verdict]] = {}
            for scene, judge in enumerate(judges):
                exact = judge.exact_results(methods.adapter, seed)
                verdicts.setdefault("exact results, through the autoencoder", []).extend(exact)
                for i, pair in enumerate(PAIRS):
                    for name, image in methods.outputs(judge.source, pair, 1000 * scene + 2 * i):
                        verdicts.setdefault(name, []).append(judge.verdict(image, pair))
                    advance(1)
            for name, row in verdicts.items():
                found.setdefault(name, []).append(row)
    return summary(found) | {
        "seeds": list(seeds),
        "seconds": round(time.monotonic() - start),
        "torch": torch.__version__,
    }


class Methods:
    """The ways to ask a student for two effects, by its stock pipeline."""

    def __init__(self, config: DistillConfig, collection: Path):
        self.pipe = load_pipeline(str(assets.pipeline_folder()), "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.adapter = assets.studio_adapter(self.pipe)
        self.effects = clora.apply(self.pipe, collection)
        self.usual = config
        data = config.data.model_copy(update={"max_sequence_length": ONE_CALL_TOKENS})
        self.longer = config.model_copy(update={"data": data})

    def outputs(self, source: np.ndarray, pair: Pair, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the name and the result ``[64, 64, 3]`` of each way."""
        first, second = (self.effects[name]["prompt"] for name in pair)
        sentence = f"Please apply {first} to the input image, and then apply {second}."
        yield "one call", stock_edit(self.pipe, self.longer, source, sentence, seed)
        between = stock_edit(self.pipe, self.usual, source, first, seed)
        yield "two calls", stock_edit(self.pipe, self.usual, between, second, seed + 1)
        # Its longer padding is new to the student: two calls with the same padding show what that costs.
        between = stock_edit(self.pipe, self.longer, source, first, seed)
        yield "two calls, longer padding", stock_edit(self.pipe, self.longer, between, second, seed + 1)


@dataclass(frozen=True)
class Verdict:
    """What an output shows.

    Attributes:
        both: both effects, in any order.
        ordered: the first one before the second.
        shown: ``both``, ``first``, ``second``, ``unchanged`` or ``other``.
    """

    both: bool
    ordered: bool
    shown: str


@dataclass(frozen=True)
class PairJudge:
    """The features ``[K, F]`` of the exact results on one source, and which effects each shows, in order."""

    source: np.ndarray
    shows: tuple[tuple[str, ...], ...]
    vectors: np.ndarray

    @staticmethod
    def of(source: np.ndarray, seed: int) -> PairJudge:
        """Applies every effect of the library, and every pair of the collection's."""
        shows: list[tuple[str, ...]] = [(), *((name,) for name in EFFECTS), *PAIRS]
        results, owners = [], []
        for effects in shows:
            rng = np.random.default_rng([seed, len(owners)])
            draws = DRAWS if any(EFFECTS[name].stochastic for name in effects) else 1
            for _ in range(draws):
                results.append(apply_exactly(effects, source, rng))
                owners.append(effects)
        return PairJudge(source, tuple(owners), features(np.stack(results)))

    def exact_results(self, adapter: Flux2KleinAdapter, seed: int) -> list[Verdict]:
        """Judges new exact results of all pairs after a round trip through the autoencoder: the most one can reach."""
        rng = np.random.default_rng([seed, 1])
        images = np.stack([apply_exactly(pair, self.source, rng) for pair in PAIRS])
        again = to_images(adapter.decode(adapter.encode_images(to_tensor(images))))
        return [self.verdict(image, pair) for image, pair in zip(again, PAIRS, strict=True)]

    def verdict(self, image: np.ndarray, pair: Pair) -> Verdict:
        """Judges one output that should show both effects of a pair."""
        nearest = self.shows[int(np.linalg.norm(self.vectors - features(image[None]), axis=1).argmin())]
        kinds: Mapping[tuple[str, ...], str] = {
            pair: "both",
            pair[::-1]: "both",
            pair[:1]: "first",
            pair[1:]: "second",
            (): "unchanged",
        }
        shown = kinds.get(nearest, "other")
        return Verdict(shown == "both", nearest == pair, shown)


def apply_exactly(effects: Sequence[str], image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies effects one after the other."""
    for name in effects:
        image = EFFECTS[name].apply(image, rng)
    return image


def summary(found: Mapping[str, Sequence[Sequence[Verdict]]]) -> dict[str, object]:
    """Returns shares of each method, and the paired difference of two calls from one with its 95 % interval."""
    methods = {}
    for name, seeds in found.items():
        rows = [verdict for row in seeds for verdict in row]
        methods[name] = {
            "outputs": len(rows),
            "both": round(float(np.mean([v.both for v in rows])), 4),
            "both_by_seed": [round(float(np.mean([v.both for v in row])), 4) for row in seeds],
            "in_order": round(float(np.mean([v.ordered for v in rows])), 4),
            "shown": dict(Counter(v.shown for v in rows)),
        }
    return {"methods": methods, "two_calls_minus_one": paired(found["two calls"], found["one call"])}


def paired(first: Sequence[Sequence[Verdict]], second: Sequence[Sequence[Verdict]]) -> dict[str, object]:
    """Returns the mean difference of two methods and its 95 % interval, by a bootstrap over scenes and pairs of effects."""
    # [seed, scene, pair]: outputs of one scene or of one pair are alike, so that these are drawn, not single outputs.
    shape = (len(first), NUM_SCENES, len(PAIRS))
    right = [
        np.array([v.both for row in method for v in row], dtype=float).reshape(shape) for method in (first, second)
    ]
    difference = (right[0] - right[1]).mean(0)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        scenes = rng.integers(NUM_SCENES, size=NUM_SCENES)
        pairs = rng.integers(len(PAIRS), size=len(PAIRS))
        means.append(difference[np.ix_(scenes, pairs)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": round(float(difference.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


if __name__ == "__main__":
    run(main)
