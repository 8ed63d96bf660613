"""RoIAlign (arXiv 1703.06870) as two products for each map.

Bilinear interpolation separates over rows and columns, and so does the mean over the samples of a
bin: a RoI's features are `W_y F W_x^T` with one small matrix for each axis. No gather, no scatter
in the gradient; a RoI of another level has matrices of zeros.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hivit_jax.detection import boxes as box_ops

SAMPLES = 16  # for each bin and axis at most; only slivers of RoIs would have more
FINEST = 56  # pixels: a RoI of this side (of its square) and up to twice it is of the finest level


def level_of(rois: jax.Array, levels: int = 4) -> jax.Array:
  """The map that a RoI's features come from: (R, 4) -> (R,) int32 in 0..levels - 1."""
  side = jnp.sqrt(jnp.maximum(box_ops.area(rois), 0))
  level = jnp.floor(jnp.log2(side / FINEST + 1e-6))
  return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


def bin_weights(
  start: jax.Array,
  side: jax.Array,
  bins: int,
  cells: int,
  own: jax.Array | int | None = None,
  samples: int = SAMPLES,
) -> jax.Array:
  """Share of each cell along one axis in each bin of a RoI.

  A bin has the mean of equally spaced samples, as many as its width in cells, rounded up, each
  linear between the centres of cells. A sample farther than a cell beyond the first or last centre
  is 0, nearer it has the border's value.

  Args:
    start: (R,) of the RoI, in cells.
    side: (R,) of the RoI, in cells; where it is not positive all weights are 0.
    bins: along the axis.
    cells: of the map along the axis.
    own: cells that belong to the image, the first ones; None: all.
    samples: the most that are taken.

  Returns:
    (R, bins, cells) in the type of `start`.
  """
  own = cells if own is None else own
  width = (side / bins)[:, None, None]
  count = jnp.clip(jnp.ceil(width), 0, samples)
  number = jnp.arange(samples, dtype=start.dtype)
  bin_start = (start - 0.5)[:, None, None] + jnp.arange(bins)[None, :, None] * width
  position = bin_start + (number + 0.5) * width / jnp.maximum(count, 1)  # (R, bins, samples)
  taken = (number < count) & (position >= -1) & (position <= own)
  position = jnp.clip(position, 0, jnp.asarray(own, start.dtype) - 1)
  shares = hat(position, cells)
  shares = jnp.where(taken[..., None], shares, 0).sum(axis=2)
  return shares / jnp.maximum(count, 1)


def hat(position: jax.Array, cells: int) -> jax.Array:
  """Weights of linear interpolation: (...) positions in cells' centres -> (..., cells)."""
  distance = jnp.abs(position[..., None] - jnp.arange(cells, dtype=position.dtype))
  return jnp.maximum(1 - distance, 0)


def roi_align(
  maps: Sequence[jax.Array],
  rois: jax.Array,
  strides: Sequence[int],
  size: int,
  own: Any = None,
  *,
  samples: int = SAMPLES,
  chunk: int = 64,
) -> jax.Array:
  """Features of RoIs, each from the map of its level; no gradient reaches the RoIs.

  Args:
    maps: (rows, columns, C) of each level, the finest first.
    rois: (R, 4) in pixels, in the type that positions are computed in.
    strides: pixels between the cells of each map.
    size: rows and columns of the result.
    own: (levels, 2) rows and columns that belong to the image, the upper left ones; None: all.
    samples: see `bin_weights`.
    chunk: RoIs that are computed at a time, for the memory that the step between the products
      takes.

  Returns:
    (R, size, size, C) in the type of the maps; zeros for an empty RoI.
  """
  rois = jax.lax.stop_gradient(rois)

  @jax.checkpoint
  def of_chunk(rois):
    level, total = level_of(rois, len(maps)), 0
    for i, (features, stride) in enumerate(zip(maps, strides, strict=True)):
      x1, y1, x2, y2 = (rois / stride).T
      rows, columns = (None, None) if own is None else (own[i][0], own[i][1])
      down = bin_weights(y1, y2 - y1, size, features.shape[0], rows, samples)
      across = bin_weights(x1, x2 - x1, size, features.shape[1], columns, samples)
      down = jnp.where((level == i)[:, None, None], down, 0)
      total = total + _products(features, down, across)
    return total

  count = len(rois)
  if count <= chunk:
    return of_chunk(rois)
  chunks = -(-count // chunk)
  padded = jnp.pad(rois, ((0, chunks * chunk - count), (0, 0))).reshape(chunks, chunk, 4)
  out = jax.lax.map(of_chunk, padded)
  return out.reshape(-1, *out.shape[2:])[:count]


def _products(features: jax.Array, down: jax.Array, across: jax.Array) -> jax.Array:
  """(H, W, C), (R, h, H), (R, w, W) -> (R, h, w, C); the longer axis goes first."""
  down, across = down.astype(features.dtype), across.astype(features.dtype)
  if features.shape[0] >= features.shape[1]:
    x = jnp.einsum('rph,hwc->rpwc', down, features)
    return jnp.einsum('rqw,rpwc->rpqc', across, x)
  x = jnp.einsum('rqw,hwc->rqhc', across, features)
  return jnp.einsum('rph,rqhc->rpqc', down, x)
