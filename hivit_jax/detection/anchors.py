"""Boxes that proposals start from: three shapes in every cell of every level."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)  # height to width
SCALE = 8.0  # side of the square anchor, in strides


def base_anchors(stride: int, scale: float = SCALE) -> np.ndarray:
  """(3, 4) float32 anchors around the origin, in the order of `RATIOS`."""
  roots = np.sqrt(np.asarray(RATIOS))
  half = np.stack([1 / roots, roots], axis=1) * (scale * stride / 2)
  return np.concatenate([-half, half], axis=1).astype(np.float32)


def level_anchors(shape: tuple[int, int], stride: int, scale: float = SCALE) -> jax.Array:
  """Anchors of a map, centred on the upper left corners of its cells.

  Args:
    shape: (rows, columns) of the map.
    stride: pixels between its cells.
    scale: side of the square anchor, in strides.

  Returns:
    (rows * columns * 3, 4) float32 in the order (row, column, ratio).
  """
  y, x = (stride * jnp.arange(n, dtype=jnp.float32) for n in shape)
  corner = jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), axis=-1)  # (rows, columns, 2)
  return (jnp.tile(corner, 2)[:, :, None] + base_anchors(stride, scale)).reshape(-1, 4)


def level_valid(shape: tuple[int, int], own: jax.Array | Sequence[int]) -> jax.Array:
  """Whether an anchor stands in the image's own part of a map.

  Args:
    shape: (rows, columns) of the map, which may be of a larger canvas.
    own: (rows, columns) of the image's own map, see `own_shapes`.

  Returns:
    (rows * columns * 3,) bool, as `level_anchors`.
  """
  rows, columns = jnp.arange(shape[0]) < own[0], jnp.arange(shape[1]) < own[1]
  inside = (rows[:, None] & columns[None, :]).reshape(-1)
  return jnp.repeat(inside, len(RATIOS), total_repeat_length=len(inside) * len(RATIOS))


def own_shapes(padded: jax.Array, strides: Sequence[int] = STRIDES) -> jax.Array:
  """Map sizes of an image by itself, whatever canvas it stands on.

  Args:
    padded: (2,) integer height and width of the image with its own padding, multiples of 32.
    strides: of the levels.

  Returns:
    (levels, 2) int32 rows and columns, rounded up.
  """
  return -(-jnp.asarray(padded, jnp.int32) // jnp.asarray(strides, jnp.int32)[:, None])
