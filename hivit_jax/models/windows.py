"""Square windows of a map, for attention whose cost grows with the map and not with its square."""

from typing import Any

import jax
import jax.numpy as jnp


def split_windows(x: Any, side: int) -> Any:
  """Cuts a map into windows; what is missing at the lower and right border is zeros.

  As in HiViT's published detectors the zeros take part: they go through a block unmasked.

  Args:
    x: (B, rows, columns, C).
    side: cells along a window's side.

  Returns:
    (B, windows, side * side, C), windows and cells in row-major order.
  """
  b, rows, columns, c = x.shape
  down, across = -(-rows // side), -(-columns // side)
  missing = down * side - rows, across * side - columns
  if any(missing):
    x = jnp.pad(x, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
  x = x.reshape(b, down, side, across, side, c).swapaxes(2, 3)
  return x.reshape(b, down * across, side * side, c)


def join_windows(windows: jax.Array, grid: tuple[int, int], side: int) -> jax.Array:
  """Inverse of `split_windows`: (B, windows, side * side, C) -> (B, *grid, C)."""
  c = windows.shape[-1]
  rows, columns = grid
  down, across = -(-rows // side), -(-columns // side)
  x = windows.reshape(-1, down, across, side, side, c).swapaxes(2, 3)
  return x.reshape(-1, down * side, across * side, c)[:, :rows, :columns]
