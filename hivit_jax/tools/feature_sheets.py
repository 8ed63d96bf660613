"""The sheets of `tools.features`: a row an image, the image first."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hivit_jax.models import inside
from hivit_jax.tools import panels
from hivit_jax.tools.components import Components
from hivit_jax.tools.panels import Panel


class Looked(NamedTuple):
  """An image and what a model computed of it.

  Attributes:
    path: of the file.
    own: (height, width) of the image in it.
    pixels: (H, W, channels) uint8, as the model got them.
    maps: (h, w, C) of each level.
    attention: (heads, units, class tokens + rows * columns) of the chosen block and units.
  """

  path: str
  own: tuple[int, int]
  pixels: np.ndarray
  maps: list[np.ndarray]
  attention: np.ndarray | None


class Neighbour(NamedTuple):
  """An image near another one.

  Attributes:
    path: of the file.
    pixels: (H, W, channels) uint8, as the model got them.
    similarity: cosine of the two images' features.
  """

  path: str
  pixels: np.ndarray
  similarity: float


def colours(looked: Sequence[Looked], levels: Sequence[Components], title: str) -> Image.Image:
  """Each image, and the principal components of each level as colours."""
  rows = []
  for i, one in enumerate(looked):
    row = [Panel(panels.of_image(one.pixels), os.path.basename(one.path))]
    for level, found in enumerate(levels, 1):
      h, w, _ = found.colours[i].shape
      picture = panels.of_colours(found.colours[i], one.pixels.shape[:2])
      row.append(Panel(picture, f'level {level}, {h}x{w}'))
    rows.append(row)
  return panels.sheet(rows, f'{title}: principal components')


def attention(
  looked: Sequence[Looked], units: Sequence[tuple[int, int]], model: Any, title: str
) -> Image.Image:
  """A row for each image and unit: where the unit is, the mean over the heads, each head."""
  rows = []
  for one in looked:
    assert one.attention is not None
    size = one.pixels.shape[:2]
    grid = inside.grid_of(model, size)
    side = size[0] / grid[0]
    for k, (row, column) in enumerate(units):
      box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
      name = f'{os.path.basename(one.path)}, unit {row},{column}'
      shown = [Panel(panels.of_image(one.pixels, [box]), name)]
      heads = one.attention[:, k, -grid[0] * grid[1] :].reshape(-1, *grid)
      names = ['mean', *(f'head {i}' for i in range(len(heads)))]
      for label, values in zip(names, [heads.mean(axis=0), *heads], strict=True):
        largest = float(values.max())
        picture = panels.of_values(values, size, 0, largest)
        shown.append(Panel(picture, f'{label}, up to {100 * largest:.1f} %'))
      rows.append(shown)
  return panels.sheet(rows, f'{title}: attention')


def similarity(
  looked: Sequence[Looked],
  maps: Sequence[Sequence[np.ndarray]],
  point: tuple[int, int],
  title: str,
) -> Image.Image:
  """Each image, the point marked in the first, and the similarity of each level to it."""
  lows = [min(float(x.min()) for x in level) for level in zip(*maps, strict=True)]
  rows = []
  for i, (one, levels) in enumerate(zip(looked, maps, strict=True)):
    height, width, _ = one.pixels.shape
    boxes = []
    if i == 0:
      x, y = point[0] * width / one.own[1], point[1] * height / one.own[0]
      reach = max(height, width) / 40
      boxes = [(x - reach, y - reach, x + reach, y + reach)]
    row = [Panel(panels.of_image(one.pixels, boxes), os.path.basename(one.path))]
    for level, (values, low) in enumerate(zip(levels, lows, strict=True), 1):
      picture = panels.of_values(values, (height, width), low, 1)
      row.append(Panel(picture, f'level {level}, {low:.2f} to 1'))
    rows.append(row)
  return panels.sheet(rows, f'{title}: cosine similarity to {point[0]},{point[1]}')


def neighbours(
  looked: Sequence[Looked], near: Sequence[Sequence[Neighbour]], title: str
) -> Image.Image:
  """Each image, and the nearest ones with their similarity."""
  rows = []
  for one, found in zip(looked, near, strict=True):
    row = [Panel(panels.of_image(one.pixels), os.path.basename(one.path))]
    row += [
      Panel(panels.of_image(other.pixels), f'{other.similarity:.3f} {os.path.basename(other.path)}')
      for other in found
    ]
    rows.append(row)
  return panels.sheet(rows, f'{title}: nearest images')
