"""Units: the squares of 16x16 pixels that an image is cut into."""

import jax
import jax.numpy as jnp

from hivit_jax.errors import UserError

UNIT = 16  # pixels: side of a unit, the stride of the tokens
PATCH = 4  # pixels: side of a sub-patch
CELLS = UNIT // PATCH  # side of a unit's grid of sub-patches


def unit_grid(image_size: tuple[int, int]) -> tuple[int, int]:
  """(rows, columns) of units in an image of (height, width) pixels."""
  height, width = image_size
  if height % UNIT or width % UNIT or min(height, width) < UNIT:
    raise UserError(f'image_size must be multiples of {UNIT} pixels, got {height}x{width}')
  return height // UNIT, width // UNIT


def split_units(images: jax.Array) -> jax.Array:
  """Cuts images into units.

  Args:
    images: (B, H, W, C); H and W multiples of 16.

  Returns:
    (B, N, 16, 16, C), units in row-major order.
  """
  b, h, w, c = images.shape
  rows, columns = unit_grid((h, w))
  # A row of pixels and channels as one axis: TPUs would fill up an axis of 3 channels to 128.
  x = images.reshape(b, rows, UNIT, columns, UNIT * c).swapaxes(2, 3)
  return x.reshape(b, rows * columns, UNIT, UNIT, c)


def join_units(units: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Inverse of `split_units`, for any side of a unit: (B, N, side, side, C) -> (B, H, W, C)."""
  b, _, side, _, c = units.shape
  x = units.reshape(b, *grid, side, side, c).swapaxes(2, 3)
  return x.reshape(b, grid[0] * side, grid[1] * side, c)


def unit_patches(units: jax.Array) -> jax.Array:
  """Sub-patches of each unit in merge order.

  A merge concatenates the 2x2 neighbours (0,0), (1,0), (0,1), (1,1) as (row, column). With the
  sub-patches nested that way twice, four consecutive ones are always what a merge concatenates.

  Args:
    units: (B, K, 16, 16, C).

  Returns:
    (B, K, 16, 4 * 4 * C): pixels of a sub-patch in (row, column, channel) order.
  """
  b, k, _, _, c = units.shape
  # row = (r2, r1, pixel row), column = (c2, c1, pixel column); the second merge joins r2 and c2.
  x = units.reshape(b, k, 2, 2, PATCH, 2, 2, PATCH, c)
  x = x.transpose(0, 1, 5, 2, 6, 3, 4, 7, 8)  # (B, K, c2, r2, c1, r1, row, column, C)
  return x.reshape(b, k, CELLS * CELLS, PATCH * PATCH * c)


def to_rows_and_columns(x: jax.Array) -> jax.Array:
  """From merge order to a grid: (B, K, 16 | 4 | 1, C) -> (B, K, side, side, C)."""
  b, k, cells, c = x.shape
  if cells == 16:
    x = x.reshape(b, k, 2, 2, 2, 2, c)  # (c2, r2, c1, r1)
    return x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(b, k, 4, 4, c)
  if cells == 4:
    return x.reshape(b, k, 2, 2, c).swapaxes(2, 3)
  return x.reshape(b, k, 1, 1, c)


def max_pool(x: jax.Array) -> jax.Array:
  """The largest of 2x2 cells, an odd last row or column dropped: (B, h, w, C).

  Of equal ones the first counts, as in PyTorch. Not `max`, whose gradient looks for what equals the
  result and divides by how many do: none, where XLA computes `x` anew and rounds it otherwise.
  """
  rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  x = x[:, :rows, :columns]
  for axis in (2, 1):
    one, two = (jax.lax.slice_in_dim(x, i, None, 2, axis) for i in (0, 1))
    x = jnp.where(one >= two, one, two)
  return x


def mean_pool(x: jax.Array) -> jax.Array:
  """The mean of 2x2 cells, an odd last row or column dropped: (B, h, w, C)."""
  rows, columns = x.shape[1] // 2, x.shape[2] // 2
  cells = x[:, : 2 * rows, : 2 * columns].reshape(x.shape[0], rows, 2, columns, 2, -1)
  return cells.mean(axis=(2, 4))


def to_map(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Cells of all units in merge order, (B, N, cells, C), to a (B, h, w, C) map."""
  return join_units(to_rows_and_columns(x), grid)


def units_inside(own: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """(B, 2) rows and columns of the images in a grid -> (B, *grid) bool, the units in them."""
  rows, columns = (jnp.arange(n) < own[:, i : i + 1] for i, n in enumerate(grid))
  return rows[:, :, None] & columns[:, None]
