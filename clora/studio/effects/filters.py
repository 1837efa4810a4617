"""Image filters shared by the effects and their judges.

Images are float32 arrays ``[64, 64, 3]`` in [0, 1], rows first, RGB. Masks are float32 ``[64, 64]`` in [0, 1].
"""

import functools

import numpy as np

from clora.studio.scenes import SIZE

# Pixel coordinates, [64, 64] each.
ROWS, COLS = (grid.astype(np.float32) for grid in np.mgrid[0:SIZE, 0:SIZE])
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def rgb(*channels: float) -> np.ndarray:
    """A colour ``[3]`` in [0, 1]."""
    return np.array(channels, dtype=np.float32)


BLACK = rgb(0, 0, 0)
WHITE = rgb(1, 1, 1)


def luminance(image: np.ndarray) -> np.ndarray:
    """Rec. 601 luma ``[..., H, W]`` of images ``[..., H, W, 3]``."""
    return image @ LUMA


def grey_image(plane: np.ndarray) -> np.ndarray:
    """The image ``[H, W, 3]`` whose three channels are a plane ``[H, W]``."""
    return plane[..., None].repeat(3, axis=-1)


@functools.cache
def blur_matrix(sigma: float, size: int = SIZE) -> np.ndarray:
    """Gaussian blur along one axis as a matrix ``[size, size]``; rows sum to 1, so borders do not darken."""
    offsets = np.arange(size)[:, None] - np.arange(size)[None, :]
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    return (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs an image ``[64, 64, 3]`` or a mask ``[64, 64]`` with a Gaussian of `sigma` pixels."""
    # A Gaussian is separable: one matrix along the rows, one along the columns.
    matrix = blur_matrix(sigma)
    if image.ndim == 2:
        return matrix @ image @ matrix.T
    return np.matmul(matrix, (matrix @ image.reshape(SIZE, -1)).reshape(image.shape))


def cell_mean(image: np.ndarray, cell: int) -> np.ndarray:
    """Averages an image ``[64, 64, C]`` over square cells: ``[64 / cell, 64 / cell, C]``."""
    # [row of cells, row in the cell, column of cells, column in the cell, C]
    count = SIZE // cell
    return image.reshape(count, cell, count, cell, -1).mean(axis=(1, 3))


def upsample(cells: np.ndarray, cell: int) -> np.ndarray:
    """Repeats every entry of ``[h, w, ...]`` over a square of `cell` pixels."""
    return cells.repeat(cell, axis=0).repeat(cell, axis=1)


def gradients(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central differences (d/drow, d/dcol) of planes ``[64, 64, ...]``, borders replicated."""
    padded = np.pad(plane, ((1, 1), (1, 1)) + ((0, 0),) * (plane.ndim - 2), mode="edge")
    return (padded[2:, 1:-1] - padded[:-2, 1:-1]) * 0.5, (padded[1:-1, 2:] - padded[1:-1, :-2]) * 0.5


def smoothstep(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a smooth cubic between."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def edge_mask(image: np.ndarray, sigma: float = 1.4) -> np.ndarray:
    """Mask ``[64, 64]`` of visible edges, about 4 px wide: thick enough for an 8x8-token model to place them.

    The largest channel's gradient counts, so an edge between two colours of equal luminance is found too.
    """
    d_row, d_col = gradients(gaussian_blur(image, sigma))
    return smoothstep(np.sqrt((d_row**2 + d_col**2).max(axis=-1)), 0.025, 0.085)


def gradient_map(values: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Colours a mask ``[64, 64]`` by evenly spaced colour stops ``[S, 3]``, linear between: ``[64, 64, 3]``."""
    position = np.clip(values, 0.0, 1.0) * (len(stops) - 1)
    # The stop below each value; 1.0 itself lies at the upper end of the last interval.
    index = np.minimum(position.astype(np.int64), len(stops) - 2)
    fraction = (position - index)[..., None]
    return stops[index] * (1.0 - fraction) + stops[index + 1] * fraction


def mix(image: np.ndarray, other: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`other` (an image or a colour) where `mask` ``[64, 64]`` is 1, `image` where it is 0."""
    return image + (other - image) * mask[..., None]


def saturate(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the distance of every pixel to its grey by `factor`."""
    grey = luminance(image)[..., None]
    return grey + (image - grey) * factor


def quantise(image: np.ndarray, levels: int) -> np.ndarray:
    """Rounds every channel to one of `levels` evenly spaced values."""
    # The value 1 belongs to the highest level.
    return np.minimum(np.floor(image * levels), levels - 1) / np.float32(levels - 1)


def discs(rows: np.ndarray, cols: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Masks ``[n, 64, 64]`` of discs with a one-pixel soft rim; centres and radii ``[n]`` in pixels."""
    distance = np.sqrt((ROWS - rows[:, None, None]) ** 2 + (COLS - cols[:, None, None]) ** 2)
    return np.clip(radii[:, None, None] + 0.5 - distance, 0.0, 1.0).astype(np.float32)
