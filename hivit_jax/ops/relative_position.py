"""Relative position bias: one number for each offset between two units of a grid, and each head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def index(ids: jax.Array | np.ndarray, grid: tuple[int, int]):
  """Rows of the table for every pair of units.

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


def plain(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """The bias of all pairs of units: (entries, heads) -> (heads, N, N), see `index`."""
  # The index is a constant of the program, not of the model.
  return jnp.moveaxis(table[index(np.arange(grid[0] * grid[1]), grid)], -1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _bias(table, grid):
  return plain(table, grid)


def _forward(table, grid):
  return plain(table, grid), None


def _backward(grid, _, g):
  rows, columns = grid
  table = jnp.einsum(
    'hiajb,ijy,abx->yxh',  # queries (i, a) and keys (j, b), each as (row, column)
    g.reshape(-1, rows, columns, rows, columns),
    *(_offsets(side).astype(g.dtype) for side in grid),
    precision='highest',
  )
  return (table.reshape(-1, len(g)),)


_bias.defvjp(_forward, _backward)


def fast(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """`plain`, whose derivative is a product with two small matrices of zeros and ones.

  The derivative of a look-up adds up all pairs of one offset by a scatter, which GPUs do in any
  order. The product adds the same numbers in a fixed order.
  """
  return _bias(table, grid)


@functools.cache
def _offsets(count: int) -> np.ndarray:
  """(count, count, 2 * count - 1): 1 at the offset from key j to query i of a row of units."""
  offset = np.arange(count)[:, None] - np.arange(count) + count - 1
  return np.eye(2 * count - 1)[offset]
