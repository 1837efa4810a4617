"""Image filters shared by the effects and their judges.

Images are float32 arrays ``[S, S, 3]`` in [0, 1], rows first, RGB; the side S is a multiple of 64. Masks are float32
``[S, S]`` in [0, 1]. Lengths are in units of 1/64 of the side, so that a filter gives the same picture at every S.
"""

import functools

import numpy as np

UNITS = 64  # the side of an image in units of length
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def rgb(*channels: float) -> np.ndarray:
    """A colour ``[3]`` in [0, 1]."""
    return np.array(channels, dtype=np.float32)


BLACK = rgb(0, 0, 0)
WHITE = rgb(1, 1, 1)


@functools.cache
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far each pixel's centre is from the upper and from the left border, in units: float32 ``[S, S]`` each."""
    rows, cols = ((np.mgrid[0:size, 0:size] + 0.5) * (UNITS / size)).astype(np.float32)
    # One pair serves all calls of a size.
    rows.flags.writeable = cols.flags.writeable = False
    return rows, cols


def rim(depth: np.ndarray) -> np.ndarray:
    """Returns the mask of what lies inside an outline, soft over one pixel.

    Args:
        depth: ``[..., S, S]``, how far inside the outline each pixel's centre is, in units; negative outside.
    """
    return np.clip(depth * (depth.shape[-1] // UNITS) + 0.5, 0.0, 1.0).astype(np.float32)


def luminance(image: np.ndarray) -> np.ndarray:
    """Rec. 601 luma ``[..., H, W]`` of images ``[..., H, W, 3]``."""
    return image @ LUMA


def grey_image(plane: np.ndarray) -> np.ndarray:
    """The image ``[H, W, 3]`` whose three channels are a plane ``[H, W]``."""
    return plane[..., None].repeat(3, axis=-1)


@functools.cache
def blur_matrix(sigma: float, size: int) -> np.ndarray:
    """Gaussian blur of `sigma` pixels along an axis, as a matrix ``[size, size]``; rows sum to 1: borders do not darken."""
    offsets = np.arange(size)[:, None] - np.arange(size)[None, :]
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    return (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs an image ``[S, S, 3]`` or a mask ``[S, S]`` with a Gaussian of `sigma` units."""
    # A Gaussian is separable: one matrix along the rows, one along the columns.
    size = len(image)
    matrix = blur_matrix(sigma * size / UNITS, size)
    if image.ndim == 2:
        return matrix @ image @ matrix.T
    return np.matmul(matrix, (matrix @ image.reshape(size, -1)).reshape(image.shape))


def cell_mean(image: np.ndarray, count: int) -> np.ndarray:
    """Averages an image ``[S, S, C]`` over a grid of square cells: ``[count, count, C]``."""
    # [row of cells, row in the cell, column of cells, column in the cell, C]
    cell = len(image) // count
    return image.reshape(count, cell, count, cell, -1).mean(axis=(1, 3))


def upsample(cells: np.ndarray, size: int) -> np.ndarray:
    """Repeats every entry of ``[count, count, ...]`` over a square: ``[size, size, ...]``."""
    cell = size // len(cells)
    return cells.repeat(cell, axis=0).repeat(cell, axis=1)


def gradients(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central differences (d/drow, d/dcol) per unit of planes ``[S, S, ...]``, borders replicated."""
    # From neighbours one unit away, not one pixel: the smoothing of a difference is then the same at every size.
    unit = len(plane) // UNITS
    padded = np.pad(plane, ((unit, unit), (unit, unit)) + ((0, 0),) * (plane.ndim - 2), mode="edge")
    inner = slice(unit, -unit)
    d_row = padded[2 * unit :, inner] - padded[: -2 * unit, inner]
    d_col = padded[inner, 2 * unit :] - padded[inner, : -2 * unit]
    return d_row * 0.5, d_col * 0.5


def smoothstep(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a smooth cubic between."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def edge_mask(image: np.ndarray, sigma: float = 1.4) -> np.ndarray:
    """Mask ``[S, S]`` of visible edges, about 4 units wide: thick enough for an 8x8-token model to place them.

    The largest channel's gradient counts, so an edge between two colours of equal luminance is found too.
    """
    d_row, d_col = gradients(gaussian_blur(image, sigma))
    return smoothstep(np.sqrt((d_row**2 + d_col**2).max(axis=-1)), 0.025, 0.085)


def gradient_map(values: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Colours a mask ``[S, S]`` by evenly spaced colour stops ``[n, 3]``, linear between: ``[S, S, 3]``."""
    position = np.clip(values, 0.0, 1.0) * (len(stops) - 1)
    # The stop below each value; 1.0 itself lies at the upper end of the last interval.
    index = np.minimum(position.astype(np.int64), len(stops) - 2)
    fraction = (position - index)[..., None]
    return stops[index] * (1.0 - fraction) + stops[index + 1] * fraction


def mix(image: np.ndarray, other: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`other` (an image or a colour) where `mask` ``[S, S]`` is 1, `image` where it is 0."""
    return image + (other - image) * mask[..., None]


def saturate(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the distance of every pixel to its grey by `factor`."""
    grey = luminance(image)[..., None]
    return grey + (image - grey) * factor


def quantise(image: np.ndarray, levels: int) -> np.ndarray:
    """Rounds every channel to one of `levels` evenly spaced values."""
    # The value 1 belongs to the highest level.
    return np.minimum(np.floor(image * levels), levels - 1) / np.float32(levels - 1)


def offsets(size: int, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far each pixel lies below and to the right of n points, in units: ``[n, size, size]`` each.

    The points ``[n]`` count from the centre of the first unit, as pixels of a 64x64 image do.
    """
    grid_rows, grid_cols = grid(size)
    return grid_rows - 0.5 - rows[:, None, None], grid_cols - 0.5 - cols[:, None, None]


def discs(size: int, rows: np.ndarray, cols: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Masks ``[n, size, size]`` of discs with a soft rim; centres (as in `offsets`) and radii ``[n]`` in units."""
    down, right = offsets(size, rows, cols)
    return rim(radii[:, None, None] - np.sqrt(down**2 + right**2))
