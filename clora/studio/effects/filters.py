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


def box_mean(image: np.ndarray, width: int) -> np.ndarray:
    """Averages ``[H, W, C]`` over windows of `width` pixels: ``[H - width + 1, W - width + 1, C]``."""
    for axis in (0, 1):
        total = np.cumsum(image, axis=axis, dtype=np.float64)
        total = np.concatenate([np.zeros_like(total.take([0], axis)), total], axis=axis)
        image = (
            total.take(range(width, total.shape[axis]), axis) - total.take(range(total.shape[axis] - width), axis)
        ) / width
    return image


def smooth_regions(image: np.ndarray, width: int) -> np.ndarray:
    """Flattens texture and keeps edges (a soft Kuwahara filter) of an image ``[S, S, 3]``.

    Each pixel becomes a mean of the four squares, `width` units wide, at whose corners it lies, weighted towards those of
    one colour.
    """
    reach = width * len(image) // UNITS - 1
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    means = box_mean(np.concatenate([padded, padded**2], axis=2), reach + 1)
    # The squares above left, above right, below left and below right of each pixel.
    near, far = slice(0, len(image)), slice(reach, reach + len(image))
    squares = np.stack([means[rows, cols] for rows in (near, far) for cols in (near, far)])
    variance = np.maximum(squares[..., 3:] - squares[..., :3] ** 2, 0.0).sum(axis=-1, keepdims=True)
    weights = 1.0 / (variance + 1e-4) ** 3
    return ((squares[..., :3] * weights).sum(axis=0) / weights.sum(axis=0)).astype(np.float32)


def outlines(image: np.ndarray, sigma: float = 0.65) -> np.ndarray:
    """Mask ``[S, S]`` of soft lines along the visible edges; a larger `sigma` makes them wider.

    A line is as strong as the slope of the steepest colour there. It does not depend on the other edges of the picture: a
    transformer of the studio's size does not learn what does.
    """
    slopes = np.hypot(*gradients(gaussian_blur(image, 1.2 * sigma)))
    # In brightness per unit: grain stays below, and an edge of a fifth of the range makes a full line.
    return smoothstep(slopes.max(axis=-1) * (sigma / 0.65), 0.03, 0.17)


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


@functools.cache
def interpolation(count: int, size: int) -> np.ndarray:
    """Smooth interpolation of `count` values along an axis, as a matrix ``[size, count]``; rows sum to 1."""
    cell = UNITS / count
    centres = (np.arange(count) + 0.5) * cell
    kernel = np.exp(-0.5 * ((grid(size)[0][:, :1] - centres) / (0.5 * cell)) ** 2)
    return (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)


def clouds(values: np.ndarray, size: int) -> np.ndarray:
    """Interpolates random numbers ``[n, n]``, one per cell of a grid, smoothly: ``[size, size]``."""
    matrix = interpolation(len(values), size)
    return matrix @ values.astype(np.float32) @ matrix.T


@functools.cache
def paper_noise(size: int, count: int) -> np.ndarray:
    """The same smooth noise ``[size, size]`` in [0, 1] at every call, for paper, chalk and ice of deterministic effects."""
    noise = clouds(np.random.default_rng(count).random((count, count)), size)
    noise.flags.writeable = False
    return noise


def border_distance(size: int) -> np.ndarray:
    """Returns each pixel's distance to the nearest border in units: ``[size, size]``."""
    rows, cols = grid(size)
    return np.minimum(np.minimum(rows, UNITS - rows), np.minimum(cols, UNITS - cols))


def polar(size: int, row: float = 32.0, col: float = 32.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pixel's distance from a point in units, and its angle in radians: ``[size, size]`` each."""
    rows, cols = grid(size)
    return np.sqrt((rows - row) ** 2 + (cols - col) ** 2), np.arctan2(rows - row, cols - col)


def screen(image: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Adds light ``[S, S, 3]`` in [0, 1] to an image; both lighten each other and cannot exceed 1."""
    return 1.0 - (1.0 - image) * (1.0 - light)


def sampled(image: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Looks up colours at positions ``[S, S]``, in units from the upper and the left border, linear between pixels."""
    size = len(image)
    rows, cols = (np.clip(axis * (size / UNITS) - 0.5, 0, size - 1) for axis in (rows, cols))
    top, left = (np.minimum(axis.astype(np.int64), size - 2) for axis in (rows, cols))
    down, right = (rows - top)[..., None], (cols - left)[..., None]
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down
