"""What an evaluation found: one method's row of the table with its intervals, and the paired difference of two methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from clora.studio.effects import EFFECTS
from clora.studio.judges import Verdict

DRAWS = 2000
CONFIDENCE = (2.5, 97.5)  # percent: an interval of 95 %
DIGITS = 5
COUNTED: dict[str, Callable[[Verdict], float | None]] = {
    "effect_accuracy": lambda verdict: verdict.accurate,
    "bad_case_rate": lambda verdict: verdict.bad_case,
    "psnr": lambda verdict: verdict.psnr,
    "subject_alignment": lambda verdict: verdict.subject_alignment,
}


@dataclass(frozen=True)
class Measured:
    """One row of the table of methods.

    Attributes:
        verdicts: effect to the verdicts on its outputs (`evaluation.judge_effects`).
        scenes: of an effect's outputs, which are these in order, once for each noise.
        general: which of the held-out general edits are correct; None where they were not asked for.
        pictures: effect to its output for the grid, uint8 ``[S, S, 3]``.
        megabytes: size of one LoRA in fp16.
        precomputed: the row ships with the studio.
    """

    verdicts: Mapping[str, Sequence[Verdict]]
    scenes: int
    general: Sequence[bool] | None
    pictures: Mapping[str, np.ndarray]
    megabytes: float | None = None
    precomputed: bool = False

    def row(self) -> dict[str, object]:
        """Returns the measured columns of the table; ``intervals`` holds the 95 % interval of each; None for the mean of nothing."""
        samples = self._samples()
        return {
            **{name: None if not len(values) else float(values.mean()) for name, values in samples.items()},
            "per_effect": {
                effect: float(np.mean([verdict.accurate for verdict in verdicts]))
                for effect, verdicts in self.verdicts.items()
            },
            "outputs": sum(map(len, self.verdicts.values())),
            "intervals": {name: interval(values) for name, values in samples.items() if len(values)},
        }

    def difference(self, other: Measured) -> dict[str, dict[str, object]]:
        """Returns the mean of each column minus that of another row, with its interval, paired by scene and noise."""
        mine, theirs = self._samples(), other._samples()
        found = {}
        for name, values in mine.items():
            if len(values) and len(values) == len(theirs[name]):
                found[name] = {
                    "mean": float((values - theirs[name]).mean()),
                    "interval": interval(values - theirs[name]),
                }
        return found

    def _samples(self) -> dict[str, np.ndarray]:
        """Returns the independent values of each column: means over effects and noises of a scene, and general edits."""
        stochastic = {name: row for name, row in self.verdicts.items() if EFFECTS[name].stochastic}
        samples = {name: self._by_scene(self.verdicts, value) for name, value in COUNTED.items()}
        samples["bad_case_rate_stochastic"] = self._by_scene(stochastic, COUNTED["bad_case_rate"])
        samples["general_accuracy"] = np.array(self.general or [], dtype=float)
        return samples

    def _by_scene(
        self, verdicts: Mapping[str, Sequence[Verdict]], value: Callable[[Verdict], float | None]
    ) -> np.ndarray:
        """Returns a value's mean over the effects that have it and the noises, for each scene: outputs of one scene are alike."""
        rows = [[value(verdict) for verdict in row] for row in verdicts.values()]
        found = np.array([row for row in rows if None not in row], dtype=float)
        return found.reshape(len(found), -1, self.scenes).mean((0, 1)) if len(found) else np.zeros(0)

    def to_json(self) -> dict[str, object]:
        """Returns everything but the pictures; a verdict's fields become lists."""
        verdicts = {
            effect: {field.name: [_rounded(asdict(v)[field.name]) for v in row] for field in fields(Verdict)}
            for effect, row in self.verdicts.items()
        }
        general = None if self.general is None else list(map(bool, self.general))
        return {"verdicts": verdicts, "scenes": self.scenes, "general": general, "megabytes": self.megabytes}

    @staticmethod
    def from_json(values: Mapping, pictures: Mapping[str, np.ndarray]) -> Measured:
        """Reads what `to_json` returned, as a row that ships."""
        verdicts = {
            effect: [Verdict(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
            for effect, columns in values["verdicts"].items()
        }
        return Measured(verdicts, values["scenes"], values["general"], pictures, values["megabytes"], precomputed=True)


def interval(values: np.ndarray) -> list[float]:
    """Returns the bounds of the mean's 95 % interval, by a bootstrap over independent values ``[N]``."""
    draws = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    return [round(float(bound), DIGITS) for bound in np.percentile(values[draws].mean(1), CONFIDENCE)]


def _rounded(value: object) -> object:
    return round(value, DIGITS) if isinstance(value, float) else value
