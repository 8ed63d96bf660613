"""Square windows of a map, for attention whose cost grows with the map and not with its square."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hivit_jax.errors import UserError


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


def run_blocks(
  run: Callable[..., jax.Array],
  x: jax.Array,
  depth: int,
  side: int | None,
  global_blocks: Sequence[int],
  inside: jax.Array | None = None,
) -> jax.Array:
  """Transformer blocks on a map, within windows or over all of it.

  Args:
    run: `(first, count, tokens, *where) -> tokens`, which runs `count` of the blocks from `first`
      on; `where` is what `layers.Block` takes besides.
    x: (B, rows, columns, C).
    depth: number of blocks.
    side: cells along a window's side; None: all blocks attend globally.
    global_blocks: blocks, counted from 0, that attend globally nevertheless.
    inside: (B, rows, columns) bool, the cells of an image that is smaller than the map. The others
      do not change what becomes of them; None: all.

  Returns:
    (B, rows, columns, C).
  """
  grid = x.shape[1], x.shape[2]
  keys = None if inside is None else inside.reshape(x.shape[0], -1)  # (B, N)
  # What a block makes of the outside must not come into the windows of the next.
  alone = inside is not None and side is not None

  def kind(i: int) -> tuple[bool, int]:
    everywhere = side is None or i in global_blocks
    return everywhere, i if alone and not everywhere else -1

  for (everywhere, _), numbers in itertools.groupby(range(depth), key=kind):
    first, *rest = numbers
    count = 1 + len(rest)
    if everywhere or side is None:
      tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # (B, N, C)
      where = (None, grid) if keys is None else (None, grid, keys)
      x = run(first, count, tokens, *where).reshape(x.shape)
    else:
      x = x if inside is None else jnp.where(inside[..., None], x, 0)
      cut = split_windows(x, side)  # (B, windows, side * side, C)
      x = join_windows(run(first, count, cut, None, grid), grid, side)
  return x


def check(side: int, global_blocks: Sequence[int], depth: int, *, biased: bool) -> None:
  """UserError unless blocks can attend within windows.

  Args:
    side: units along a window's side.
    global_blocks: those of `depth` blocks that attend globally nevertheless.
    depth: number of blocks.
    biased: the blocks have a relative position bias.
  """
  if side < 1 or not set(global_blocks) <= set(range(depth)):
    raise UserError(
      f'window_size must be positive and global_blocks within 0..{depth - 1}, '
      f'got {side} and {tuple(global_blocks)}'
    )
  if biased:
    raise UserError(
      'window attention has no relative position bias: create the model with rpe=False, '
      'or leave out window_size'
    )
