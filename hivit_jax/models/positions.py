"""Position information: fixed sin-cos embeddings and relative position bias indices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.models import resize
from hivit_jax.ops.gather import gather_pairs


def sincos_2d(dim: int, grid: tuple[int, int], class_tokens: int = 0) -> jax.Array:
  """2-D sin-cos position embedding, as in MAE (arXiv 2111.06377).

  The first half of the channels encodes the column, the second half the row; each half is
  `[sin, cos]` over `dim / 4` geometric frequencies.

  Args:
    dim: channels, a multiple of 4.
    grid: (rows, columns) of units.
    class_tokens: zeros before the units.

  Returns:
    (1, class_tokens + rows * columns, dim) float32, units in row-major order.
  """
  if dim % 4:
    raise ValueError(f'sin-cos position embeddings need a multiple of 4 channels, got {dim}')
  frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))

  def along(length: int) -> jax.Array:  # (length, dim / 2)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)

  # JAX spreads the two over the grid: nothing of its size is computed for a model's shapes alone.
  rows, columns = grid
  halves = (along(columns)[None, :], along(rows)[:, None])
  units = jnp.concatenate([jnp.broadcast_to(h, (rows, columns, dim // 2)) for h in halves], axis=2)
  return jnp.pad(units.reshape(1, rows * columns, dim), ((0, 0), (class_tokens, 0), (0, 0)))


def relative_position_index(ids: jax.Array | np.ndarray, grid: tuple[int, int]):
  """Rows of the relative position bias table for every pair of units.

  The table holds `(2 * rows - 1) * (2 * columns - 1)` entries, one per offset (dy, dx), at
  `(dy + rows - 1) * (2 * columns - 1) + (dx + columns - 1)` (Swin, arXiv 2103.14030).

  Args:
    ids: (..., K) integer positions of the units in the row-major grid.
    grid: (rows, columns) of the whole grid.

  Returns:
    (..., K, K) integers: entry (i, j) belongs to query i and key j.
  """
  rows, columns = grid
  y, x = ids // columns, ids % columns
  dy = y[..., :, None] - y[..., None, :] + rows - 1
  dx = x[..., :, None] - x[..., None, :] + columns - 1
  return dy * (2 * columns - 1) + dx


def relative_position_bias(table: jax.Array, grid: tuple[int, int], ids: jax.Array | None = None):
  """Bias to add to the attention logits.

  Args:
    table: (entries, heads), see `relative_position_index`.
    grid: (rows, columns) of the whole grid.
    ids: (B, K) positions of the units present; None when all are.

  Returns:
    (heads, N, N) without ids, (B, heads, K, K) with.
  """
  bias = _bias(grid, jnp.asarray(table))
  return bias if ids is None else gather_pairs(bias, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bias(grid: tuple[int, int], table: jax.Array) -> jax.Array:
  # The index is a constant of the program, not of the model.
  index = relative_position_index(np.arange(grid[0] * grid[1]), grid)
  return jnp.moveaxis(table[index], -1, 0)


def _bias_backward(grid, table, g):
  # The derivative of the gather would add up all pairs of one offset by a scatter. Products with
  # matrices of zeros and ones add the same numbers in a fixed order.
  return jax.linear_transpose(functools.partial(_bias_by_products, grid), table)(g)


_bias.defvjp(lambda grid, table: (_bias(grid, table), table), _bias_backward)


def _bias_by_products(grid: tuple[int, int], table: jax.Array) -> jax.Array:
  """`_bias`, computed by two products with small constant matrices."""
  rows, columns = grid
  bias = resize.apply_separable(_pairs_of_offset(rows), _pairs_of_offset(columns), table[None])
  bias = bias.reshape(rows, rows, columns, columns, -1).transpose(4, 0, 2, 1, 3)
  return bias.reshape(-1, rows * columns, rows * columns)


@functools.cache
def _pairs_of_offset(count: int) -> np.ndarray:
  """(count * count, 2 * count - 1): 1 where query i and key j of a row are i - j cells apart."""
  offset = np.arange(count)[:, None] - np.arange(count) + count - 1
  return np.eye(2 * count - 1)[offset.reshape(-1)]
