"""Windows of units, for attention whose cost grows with the image and not with its square."""

import jax
import jax.numpy as jnp


def split_windows(x: jax.Array, grid: tuple[int, int], side: int) -> jax.Array:
  """Cuts a grid of units into windows; what is missing at the lower and right border is zeros.

  As in the reference the zeros take part: they go through the block like any unit, unmasked.

  Args:
    x: (B, rows * columns, C).
    grid: (rows, columns).
    side: units along a window's side.

  Returns:
    (B * windows, side * side, C); the windows of one example follow one another.
  """
  b, _, c = x.shape
  down, across = windows_in(grid, side)
  x = x.reshape(b, *grid, c)
  x = jnp.pad(x, ((0, 0), (0, down * side - grid[0]), (0, across * side - grid[1]), (0, 0)))
  x = x.reshape(b, down, side, across, side, c).swapaxes(2, 3)
  return x.reshape(b * down * across, side * side, c)


def join_windows(windows: jax.Array, grid: tuple[int, int], side: int) -> jax.Array:
  """Inverse of `split_windows`: (B * windows, side * side, C) -> (B, rows * columns, C)."""
  c = windows.shape[-1]
  down, across = windows_in(grid, side)
  x = windows.reshape(-1, down, across, side, side, c).swapaxes(2, 3)
  x = x.reshape(-1, down * side, across * side, c)[:, : grid[0], : grid[1]]
  return x.reshape(-1, grid[0] * grid[1], c)


def windows_in(grid: tuple[int, int], side: int) -> tuple[int, int]:
  """How many windows cover the rows and the columns of a grid."""
  return -(-grid[0] // side), -(-grid[1] // side)
