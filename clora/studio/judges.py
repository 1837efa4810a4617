"""Judges decide which effect an output shows, how strongly, and how much of the subject is left.

One feature map (`features`, or that of the second opinion) serves all effects. The distance of an output to effect e is the Euclidean feature
distance to the nearest of e's exact results on the same source: one for a deterministic effect, `NUM_DRAWS` for a
stochastic one. `Judge.score` turns these distances into the numbers of the evaluation table.

Legend: N images, F features, K exact results of all effects on one source, E effects.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from clora.errors import CloraError
from clora.errors import nearest as suggest
from clora.studio.effects import EFFECTS, Effect
from clora.studio.effects.filters import UNITS, blur_matrix

UNCHANGED = "unchanged"
STRENGTH_FLOOR = 0.5
NUM_DRAWS = 16  # exact results of a stochastic effect

# Weight of each feature group: a group's block is scaled by weight / sqrt(dimensions), so a weight is the share of a
# root-mean-square difference of 1 in that group. The two groups that depend on position (`low`, `local`) weigh less
# than the others: two draws of a stochastic effect differ in the former and agree in the latter.
WEIGHTS = {"low": 0.35, "local": 1.0, "texture": 3.0, "colour": 1.5, "hue": 2.0, "palette": 3.0}
HUE_BINS = 12
# Images per pass: larger temporaries leave the processor's cache, and the pass takes 3 times as long.
CHUNK = 16
# Summed over colours; white noise at 30 dB has a gradient energy of 0.0015.
NOISE_ENERGY = np.float32(0.0036)


def features(images: np.ndarray) -> np.ndarray:
    """Maps images, averaged down to 64x64 pixels, to the vectors that every judge compares.

    Groups, each scaled by its entry of `WEIGHTS`:

    - ``low`` (192): the image averaged over its 8x8 tokens.
    - ``local`` (160): roots of mean energies in a 4x4 grid of cells, at full and at half size. They are those of
      gradients in four soft orientations and of the high-frequency residue.
    - ``texture`` (10): the same ten roots over the whole image, wherever the texture lies.
    - ``colour`` (11): mean, standard deviation and covariances of R, G, B; mean and standard deviation of chroma.
    - ``hue`` (12): soft histogram of hue weighted by chroma, so grey pixels do not count.
    - ``palette`` (27): root of the soft histogram of RGB over a 3x3x3 grid of colours.

    Averages and roots keep the map steady under the blur and noise of a VAE round trip; the histograms are linear
    interpolations, so a small colour error moves little mass.

    Args:
        images: ``[N, S, S, 3]`` in [0, 1], S a multiple of 64.

    Returns:
        float32 ``[N, F]``.

    Raises:
        ValueError: wrong shape or non-finite values.
    """
    check_images(images)
    if len(images) > CHUNK:
        return np.concatenate([features(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)])
    planes = np.clip(images, 0.0, 1.0).astype(np.float32).transpose(0, 3, 1, 2)
    if planes.shape[-1] > UNITS:
        planes = _pool(planes, planes.shape[-1] // UNITS)
    # Energies are read at two scales, colours at half the size.
    half = _pool(planes, 2)
    energies = np.concatenate([_energies(planes), _energies(half)], axis=1)
    colours = half.reshape(len(images), 3, -1)
    groups = {
        "low": _pool(planes, 8).reshape(len(images), -1),
        "local": _root(energies).reshape(len(images), -1),
        "texture": _root(energies.mean(axis=(2, 3))),
        "colour": _colour_moments(colours),
        "hue": _hue_histogram(colours),
        "palette": _palette_histogram(colours),
    }
    scaled = [block * (WEIGHTS[name] / np.sqrt(block.shape[1])) for name, block in groups.items()]
    return np.concatenate(scaled, axis=1).astype(np.float32)


def check_images(images: np.ndarray) -> None:
    """Refuses what is not images ``[N, S, S, 3]``, S a multiple of 64.

    Raises:
        ValueError: wrong shape or non-finite values.
    """
    size = images.shape[1] if images.ndim == 4 else 0
    if size == 0 or size % UNITS or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"expected images [N, S, S, 3], S a multiple of {UNITS}, got {list(images.shape)}; resize them"
        )
    if not np.isfinite(images).all():
        raise ValueError("images contain NaN or infinite values; the generator that made them diverged")


def low_frequency(images: np.ndarray) -> np.ndarray:
    """Averages images ``[N, S, S, 3]`` over an 8x8 grid of cells: ``[N, 8, 8, 3]``."""
    planes = images.transpose(0, 3, 1, 2).astype(np.float32)
    return _pool(planes, images.shape[1] // 8).transpose(0, 2, 3, 1)


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the structural similarity of two square images ``[S, S, 3]`` in [0, 1], averaged over pixels and channels.

    The window is a Gaussian of 1.5 px, renormalised at the borders; constants as usual (0.01 and 0.03 squared).
    """
    window = blur_matrix(1.5, len(first))

    def local_mean(image: np.ndarray) -> np.ndarray:
        return np.einsum("ij,jkc,lk->ilc", window, image, window, optimize=True)

    mean_a = local_mean(first)
    mean_b = local_mean(second)
    # E[a b] - E[a] E[b] within each window, and the same of each image with itself.
    variance_a = local_mean(first**2) - mean_a**2
    variance_b = local_mean(second**2) - mean_b**2
    covariance = local_mean(first * second) - mean_a * mean_b
    c1 = 0.01**2
    c2 = 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(similarity.mean())


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio in dB of images in [0, 1]; at most 100, so that equal images stay finite."""
    return float(-10 * np.log10(max(np.mean((first - second) ** 2, dtype=np.float64), 1e-10)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judge's verdict on one output.

    Attributes:
        distance: feature distance to the nearest exact result of the requested effect.
        nearest: the effect whose exact results are nearest, or "unchanged".
        accurate: `nearest` is the requested effect.
        strength: 1 - distance / the unchanged source's distance, clipped to [0, 1].
        bad_case: not accurate, or strength below 0.5.
        psnr: dB against the exact result; None for a stochastic effect.
        subject_alignment: 0 for a bad case, else 1 + 4 x SSIM to the nearest exact result (stochastic: SSIM of the
            low-frequency images), so at most 5.
    """

    distance: float
    nearest: str
    accurate: bool
    strength: float
    bad_case: bool
    psnr: float | None
    subject_alignment: float


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """The exact results of every effect on one source, as features; made by `for_source`.

    Attributes:
        names: the library's effects, then "unchanged"; E + 1 of them.
        owners: integers ``[K]``, the index into `names` of each exact result; sorted.
        vectors: float32 ``[K, F]``, their features.
        exact: the result image ``[S, S, 3]`` of each deterministic effect.
        low: the low-frequency results ``[NUM_DRAWS, 8, 8, 3]`` of each stochastic effect; its full-size draws are
            not kept, or a judge would hold 16 MB instead of 4.
        feature_map: maps images ``[N, S, S, 3]`` to float32 ``[N, F]``.
    """

    names: tuple[str, ...]
    owners: np.ndarray
    vectors: np.ndarray
    exact: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    feature_map: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def for_source(
        cls,
        source: np.ndarray,
        seed: int,
        effects: Mapping[str, Effect] = EFFECTS,
        feature_map: Callable[[np.ndarray], np.ndarray] = features,
    ) -> "Judge":
        """Applies every effect to `source` and keeps the features of the results.

        Args:
            source: ``[S, S, 3]`` in [0, 1], S a multiple of 64.
            seed: of the stochastic draws; an effect's draws depend on its name too, not on the rest of the library.
            effects: the library to choose from.
            feature_map: what outputs are compared by.

        Raises:
            ValueError: wrong shape or non-finite values.
        """
        results, owners = [], []
        exact, low = {}, {}
        for index, (name, effect) in enumerate(effects.items()):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            draws = [effect.apply(source, rng) for _ in range(NUM_DRAWS if effect.stochastic else 1)]
            if effect.stochastic:
                low[name] = low_frequency(np.stack(draws))
            else:
                exact[name] = draws[0]
            results += draws
            owners += [index] * len(draws)
        # The unchanged source comes last, as one more thing that an output can resemble.
        vectors = feature_map(np.stack([*results, np.asarray(source, dtype=np.float32)]))
        return cls((*effects, UNCHANGED), np.array([*owners, len(effects)]), vectors, exact, low, feature_map)

    def distances(self, outputs: np.ndarray) -> np.ndarray:
        """Returns the distances of outputs ``[N, S, S, 3]`` to the nearest exact result of each of `names`: ``[N, E + 1]``."""
        found = self.feature_map(outputs)
        to_results = np.stack([np.linalg.norm(self.vectors - vector, axis=1) for vector in found])
        first = np.searchsorted(self.owners, np.arange(len(self.names)))
        return np.minimum.reduceat(to_results, first, axis=1)

    def score(self, output: np.ndarray, effect_name: str) -> Verdict:
        """Judges one output ``[S, S, 3]`` in [0, 1], as large as the source, that should show `effect_name`.

        Raises:
            CloraError: unknown effect.
            ValueError: wrong shape or non-finite values.
        """
        if effect_name not in self.exact and effect_name not in self.low:
            known = self.names[:-1]
            raise CloraError(
                f"unknown effect '{effect_name}'{suggest(effect_name, known)} (this judge has {len(known)} effects)"
            )
        if effect_name in self.exact and output.shape != self.exact[effect_name].shape:
            source_shape = list(self.exact[effect_name].shape)
            raise ValueError(
                f"expected an output of the source's shape {source_shape}, got {list(output.shape)}; resize it"
            )
        to_results = np.linalg.norm(self.vectors - self.feature_map(output[None]), axis=1)
        nearest = self.names[self.owners[to_results.argmin()]]
        # The requested effect's exact results, several for a stochastic one: the nearest counts.
        own = np.flatnonzero(self.owners == self.names.index(effect_name))
        distance = float(to_results[own].min())
        source_distance = float(np.linalg.norm(self.vectors[own] - self.vectors[-1], axis=1).min())
        # An effect that leaves this source as it is cannot be shown strongly on it.
        strength = max(0.0, 1.0 - distance / source_distance) if source_distance > 0 else 0.0
        accurate = nearest == effect_name
        bad_case = not accurate or strength < STRENGTH_FLOOR
        # A stochastic effect has no one result to compare pixels with: the low frequencies of the nearest draw stand in.
        output = np.clip(output, 0.0, 1.0).astype(np.float32)
        if effect_name in self.exact:
            fidelity = psnr(output, self.exact[effect_name])
            similarity = ssim(output, self.exact[effect_name])
        else:
            fidelity = None
            similarity = ssim(low_frequency(output[None])[0], self.low[effect_name][to_results[own].argmin()])
        return Verdict(
            distance=distance,
            nearest=nearest,
            accurate=accurate,
            strength=strength,
            bad_case=bad_case,
            psnr=fidelity,
            subject_alignment=0.0 if bad_case else 1.0 + 4.0 * similarity,
        )


def _root(energies: np.ndarray) -> np.ndarray:
    """Takes the square root above a noise floor: on flat areas a plain root would amplify the 30 dB noise of a VAE."""
    return np.sqrt(energies + NOISE_ENERGY) - np.sqrt(NOISE_ENERGY)


@functools.cache
def _pooling_matrix(size: int, cell: int) -> np.ndarray:
    return np.repeat(np.eye(size // cell, dtype=np.float32) / cell, cell, axis=1)


def _pool(planes: np.ndarray, cell: int) -> np.ndarray:
    """Averages planes ``[..., S, S]`` over square cells: ``[..., S / cell, S / cell]``."""
    # Planes are square: the same matrix averages rows and, transposed, columns.
    matrix = _pooling_matrix(planes.shape[-1], cell)
    return matrix @ planes @ matrix.T


def _energies(planes: np.ndarray) -> np.ndarray:
    """Returns mean energies ``[N, 5, 4, 4]`` of ``[N, 3, S, S]`` per cell, summed over colours.

    Four orientations and the high-frequency residue; the outermost pixel has no full neighbourhood and counts as 0.
    """
    up, down = planes[..., :-2, 1:-1], planes[..., 2:, 1:-1]
    left, right = planes[..., 1:-1, :-2], planes[..., 1:-1, 2:]
    d_row = 0.5 * (down - up)
    d_col = 0.5 * (right - left)
    # The double-angle form gives soft orientation bins 45 degrees apart without computing an angle.
    along = (d_row**2 - d_col**2).sum(axis=1)
    diagonal = 2 * (d_row * d_col).sum(axis=1)
    # The second difference: fine texture that has no one direction.
    residue = ((planes[..., 1:-1, 1:-1] - 0.25 * (up + down + left + right)) ** 2).sum(axis=1)
    parts = [np.maximum(along, 0), np.maximum(-along, 0), np.maximum(diagonal, 0), np.maximum(-diagonal, 0), residue]
    size = planes.shape[-1]
    # Sums over cells of a grid of the full size; the missing rim is left out of sums, but not of their divisor.
    matrix = _pooling_matrix(size, size // 4)[:, 1:-1]
    return matrix @ np.stack(parts, axis=1) @ matrix.T


def _colour_moments(colours: np.ndarray) -> np.ndarray:
    """Returns moments ``[N, 11]`` of ``[N, 3, P]``: mean, deviation, covariance, mean and deviation of chroma."""
    mean = colours.mean(axis=2)
    centred = colours - mean[..., None]
    covariance = np.matmul(centred, centred.transpose(0, 2, 1)) / colours.shape[2]
    deviation = np.sqrt(np.einsum("nii->ni", covariance))
    # Signed root: covariances get the units of the standard deviations beside them.
    off_diagonal = covariance[:, [0, 0, 1], [1, 2, 2]]
    signed = np.sign(off_diagonal) * np.sqrt(np.abs(off_diagonal))
    chroma = colours.max(axis=1) - colours.min(axis=1)
    return np.concatenate(
        [mean, deviation, signed, chroma.mean(1, keepdims=True), chroma.std(1, keepdims=True)], axis=1
    )


def _hue_histogram(colours: np.ndarray) -> np.ndarray:
    """Returns the soft histogram ``[N, 12]`` of hue of ``[N, 3, P]``, weighted by chroma."""
    red, green, blue = colours.transpose(1, 0, 2)
    chroma = colours.max(axis=1) - colours.min(axis=1)
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) * (HUE_BINS / (2 * np.pi))
    offset = np.abs(hue[:, None] - np.arange(HUE_BINS, dtype=np.float32)[:, None])
    # Hue runs from -6 to 6 bins and the bins from 0 to 11: the shorter way round the colour wheel counts.
    share = np.maximum(1.0 - np.minimum(offset, np.abs(offset - HUE_BINS)), 0.0)
    return np.matmul(share, chroma[..., None])[..., 0] / colours.shape[2]


def _palette_histogram(colours: np.ndarray) -> np.ndarray:
    """Returns the roots ``[N, 27]`` of the soft histogram of colours of ``[N, 3, P]``."""
    # The share of each of three levels in each channel, [N, 3, 3, P]; their products are the shares of 27 colours.
    levels = np.array([0, 0.5, 1], np.float32)[:, None]
    share = np.maximum(1.0 - 2.0 * np.abs(colours[:, :, None] - levels), 0.0)
    red, green, blue = share.transpose(1, 0, 2, 3)
    red_green = (red[:, :, None] * green[:, None]).reshape(len(colours), 9, -1)
    counts = np.matmul(red_green, blue.transpose(0, 2, 1)) / colours.shape[2]
    return np.sqrt(counts.reshape(len(colours), 27))
