"""Position information: fixed sin-cos embeddings and relative position bias indices."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_2d(dim: int, grid: tuple[int, int], class_tokens: int = 0) -> np.ndarray:
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
  rows, columns = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in grid), indexing='ij')
  halves = []
  for coordinate in (columns, rows):
    angles = coordinate.reshape(-1, 1) * frequencies  # (N, dim / 4)
    halves += [np.sin(angles), np.cos(angles)]
  units = np.concatenate(halves, axis=1)[None].astype(np.float32)
  return np.pad(units, ((0, 0), (class_tokens, 0), (0, 0)))


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
  if ids is None:
    # The index is a constant of the program, not of the model.
    index = relative_position_index(np.arange(grid[0] * grid[1]), grid)
  else:
    index = relative_position_index(ids, grid)
  return jnp.moveaxis(table[index], -1, -3)
