"""What a model computes of an image on its way, compiled once for each size of images."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from hivit_jax.models import inside
from hivit_jax.tasks.images import normalize

Attention = Callable[[Sequence[jax.Array], tuple[int, int]], Any]


def function(
  model: Any, attention: Attention | None = None, **pixels: Any
) -> Callable[[np.ndarray], tuple[list[np.ndarray], Any]]:
  """A function from one image to its feature maps and, if it is asked for, attention.

  Args:
    model: from `create_model`.
    attention: what to keep, from that of all blocks (see `inside.look`) and the grid of units.
    **pixels: `mean` and `std`.

  Returns:
    (H, W, channels) uint8 -> (h, w, C) float32 of each level; what `attention` returned, or None.
  """
  graphdef, params = nnx.split(model)

  @jax.jit
  def compute(params, image):
    found = inside.look(nnx.merge(graphdef, params), normalize(image[None], **pixels))
    maps = [level[0].astype(np.float32) for level in found.maps]
    grid = inside.grid_of(model, image.shape[:2])
    return maps, None if attention is None else attention(found.attention, grid)

  return lambda image: jax.device_get(compute(params, image))


def of_image(block: jax.Array, units: int) -> jax.Array | None:
  """A block's attention over the whole of one image, (heads, N, N); None if windows divide it.

  Args:
    block: (heads, N, N), or (windows, heads, n, n).
    units: of the image.
  """
  if block.ndim == 3:
    return block
  only = block.shape[0] == 1 and block.shape[-1] == units
  return block[0] if only else None


def of_units(attention: Any, units: Sequence[tuple[int, int]], grid: tuple[int, int]) -> Any:
  """How some units attend: (heads, N, N), class tokens first -> (heads, units, N).

  Args:
    attention: of a block, over the whole image.
    units: (row, column) of each, from 0.
    grid: rows and columns of units.
  """
  rows, columns = grid
  first = attention.shape[-1] - rows * columns  # class tokens
  return attention[:, np.array([first + row * columns + column for row, column in units])]


def resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
  """The whole image in (height, width) pixels: (H, W, channels) uint8."""
  pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
  return pixels.reshape(*size, -1)
