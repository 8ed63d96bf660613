"""Position information: fixed sin-cos embeddings and relative position bias."""

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.ops.choice import FAST, Ops


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


def relative_position_bias(
  table: jax.Array, grid: tuple[int, int], ids: jax.Array | None = None, *, ops: Ops = FAST
) -> jax.Array:
  """Bias to add to the attention logits.

  Args:
    table: (entries, heads), see `ops.relative_position.index`.
    grid: (rows, columns) of the whole grid.
    ids: (B, K) positions of the units present; None when all are.
    ops: that compute it.

  Returns:
    (heads, N, N) without ids, (B, heads, K, K) with.
  """
  bias = ops.relative_position_bias(jnp.asarray(table), grid)
  return bias if ids is None else ops.gather_pairs(bias, ids)
