"""Maps and position parameters for another grid.

All schemes are linear and separate over rows and columns, so each is a product with two small
constant matrices: it works on numpy arrays, inside `jit`, and under `grad`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CUBIC = -0.75  # PyTorch's choice for the free coefficient of the convolution kernel
_GROWTH = (1.01, 1.5)  # bounds of the geometric sequence, as in BEiT


def position_embedding(
  embedding: Any, source: tuple[int, int], target: tuple[int, int], *, overhang: float = 0.0
) -> Any:
  """Resizes an absolute position embedding bicubically.

  Args:
    embedding: (1, rows * columns, C) numpy or JAX array for the grid `source`.
    source: (rows, columns) of units.
    target: (rows, columns) of units.
    overhang: units added to the target's sides, which shifts the samples. The
      published detectors were trained with 0.1, an inheritance from DINO's guard against rounding.

  Returns:
    (1, rows * columns, C) for `target`: what PyTorch's `interpolate(size=target, mode='bicubic',
    align_corners=False)` gives; the same array when the grids are equal.
  """
  return embedding if source == target else resampled(embedding, source, target, overhang)


def resampled(
  embedding: Any, source: tuple[int, int], target: tuple[int, int], overhang: float
) -> Any:
  """As `position_embedding`, but with an overhang the samples of an equal grid move, too."""
  rows, columns = (_bicubic_matrix(*sides, overhang) for sides in zip(source, target, strict=True))
  return apply_separable(rows, columns, embedding)


def own_position_embeddings(
  embedding: jax.Array,
  source: tuple[int, int],
  canvas: tuple[int, int],
  own: jax.Array | None,
  *,
  overhang: float = 0.0,
) -> jax.Array:
  """`position_embedding` for the grid of each image, in the upper left of a canvas.

  Args:
    embedding: (1, rows * columns, C) for the grid `source`.
    source: (rows, columns) of units.
    canvas: (rows, columns) of units, no less than the images'.
    own: (B, 2) rows and columns of the images' grids, known only when it runs; None: the canvas.
    overhang: see `position_embedding`.

  Returns:
    (B, rows * columns, C) for the canvas, zeros outside the images; B is 1 without `own`.
  """
  if own is None:
    return position_embedding(embedding, source, canvas, overhang=overhang)
  # A grid like the source's keeps its embedding, which the overhang would change.
  same = (own == jnp.asarray(source)).all(axis=1)
  matrices = []
  for axis in range(2):
    table = jnp.asarray(_matrices(source[axis], canvas[axis], overhang), embedding.dtype)
    matrices.append(table[jnp.where(same, 0, own[:, axis])])
  x = embedding.reshape(*source, -1)
  x = jnp.einsum('bqw,hwc->bhqc', matrices[1], x, precision='highest')
  x = jnp.einsum('bph,bhqc->bpqc', matrices[0], x, precision='highest')
  return x.reshape(x.shape[0], -1, x.shape[-1])


@functools.lru_cache(maxsize=64)
def _matrices(source: int, most: int, overhang: float) -> np.ndarray:
  """(most + 1, most, source) weights for every length up to `most`; at 0 those that copy."""
  table = np.zeros((most + 1, most, source))
  table[0, : min(source, most)] = np.eye(source)[:most]
  for length in range(1, most + 1):
    table[length, :length] = _bicubic_matrix(source, length, overhang)
  return table


def bias_table(table: Any, source: tuple[int, int], target: tuple[int, int]) -> Any:
  """Resizes a relative position bias table by a cubic spline over a geometric sequence of offsets.

  Near offsets keep their meaning in units, far ones are stretched (BEiT, arXiv 2106.08254).

  Args:
    table: ((2 * rows - 1) * (2 * columns - 1), heads) numpy or JAX array for the grid `source`.
    source: (rows, columns) of units.
    target: (rows, columns) of units.

  Returns:
    The table for `target`; the same array when the grids are equal.
  """
  if source == target:
    return table
  rows, columns = (_offset_matrix(*sides) for sides in zip(source, target, strict=True))
  return apply_separable(rows, columns, table[None])[0]


def apply_separable(rows: np.ndarray, columns: np.ndarray, values: Any) -> Any:
  """Multiplies rows and columns of a grid: (b, h * w, c) -> (b, H * W, c).

  Args:
    rows: (H, h) constant.
    columns: (W, w) constant.
    values: (b, h * w, c) numpy or JAX array.
  """
  b, _, c = values.shape
  on_host = isinstance(values, np.ndarray)
  product = np.matmul if on_host else functools.partial(jnp.matmul, precision='highest')
  x = product(columns.astype(values.dtype), values.reshape(b, rows.shape[1], columns.shape[1], c))
  x = product(rows.astype(values.dtype), x.reshape(b, rows.shape[1], -1))
  return x.reshape(b, -1, c)


def bilinear(x: Any, size: Sequence[int]) -> Any:
  """Resizes maps without antialiasing, half-pixel centres.

  Args:
    x: (B, h, w, C) numpy or JAX array.
    size: (H, W).

  Returns:
    (B, H, W, C): what PyTorch's `interpolate(size=size, mode='bilinear', align_corners=False)`
    gives.
  """
  return _resize_map(x, size, bilinear_matrix)


def adaptive_mean(x: Any, cells: int) -> Any:
  """Means over `cells` x `cells` parts of a map, which overlap where its sides are no multiples.

  Args:
    x: (B, h, w, C) numpy or JAX array.
    cells: a side.

  Returns:
    (B, cells, cells, C): what PyTorch's `adaptive_avg_pool2d` gives.
  """
  return _resize_map(x, (cells, cells), _mean_matrix)


def _resize_map(x: Any, size: Sequence[int], matrix: Any) -> Any:
  if x.shape[1:3] == tuple(size) and matrix is bilinear_matrix:
    return x
  rows, columns = (matrix(*sides) for sides in zip(x.shape[1:3], size, strict=True))
  cells = apply_separable(rows, columns, x.reshape(x.shape[0], -1, x.shape[-1]))
  return cells.reshape(x.shape[0], *size, -1)


@functools.lru_cache(maxsize=256)
def bilinear_matrix(source: int, target: int) -> np.ndarray:
  """(target, source) weights of a linear interpolation whose border is repeated; float64."""
  center = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, None)
  first = np.minimum(np.floor(center).astype(int), source - 1)
  second = np.minimum(first + 1, source - 1)
  matrix, places = np.zeros((target, source)), np.arange(target)
  np.add.at(matrix, (places, first), 1 - (center - first))
  np.add.at(matrix, (places, second), center - first)
  return matrix


@functools.lru_cache(maxsize=64)
def _mean_matrix(source: int, target: int) -> np.ndarray:
  """(target, source) weights of the means over floor(i n / m) .. ceil((i + 1) n / m)."""
  matrix = np.zeros((target, source))
  for i in range(target):
    first, end = i * source // target, -(-(i + 1) * source // target)
    matrix[i, first:end] = 1 / (end - first)
  return matrix


@functools.lru_cache(maxsize=64)
def _bicubic_matrix(source: int, target: int, overhang: float) -> np.ndarray:
  """(target, source) weights of a cubic convolution whose border is repeated."""
  center = (np.arange(target) + 0.5) * source / (target + overhang) - 0.5
  first = np.floor(center).astype(int) - 1
  matrix = np.zeros((target, source))
  for tap in range(4):
    distance = np.abs(center - (first + tap))
    np.add.at(
      matrix,
      (np.arange(target), np.clip(first + tap, 0, source - 1)),
      np.where(
        distance <= 1,
        ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1,
        _CUBIC * (((distance - 5) * distance + 8) * distance - 4),
      ),
    )
  return matrix


@functools.lru_cache(maxsize=64)
def _offset_matrix(source: int, target: int) -> np.ndarray:
  """(2 * target - 1, 2 * source - 1) weights from the offsets of one axis to those of another.

  The offset i of the source stands at 1 + q + ... + q^(i - 1) units, with the q that lets its
  largest offset reach the target's.
  """
  if source == target:
    return np.eye(2 * source - 1)
  if source == 1:  # one offset, zero: there is nothing to interpolate
    return np.ones((2 * target - 1, 1))
  low, high = _GROWTH
  growth = low
  while high - low > 1e-6:
    growth = (low + high) / 2
    if (growth ** (source - 1) - 1) / (growth - 1) > target - 1:
      high = growth
    else:
      low = growth
  far = np.cumsum(growth ** np.arange(source - 1))
  known = np.concatenate([-far[::-1], [0.0], far])
  wanted = np.clip(np.arange(1 - target, target), known[0], known[-1])
  degree = min(3, len(known) - 1)  # three points determine a parabola
  from scipy import interpolate  # half a second, which hardly any run needs to wait for

  return interpolate.make_interp_spline(known, np.eye(len(known)), k=degree)(wanted)
