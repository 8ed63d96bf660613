"""Pictures of label maps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hivit_jax.tasks.fonts import default_font

_UNKNOWN = (255, 255, 255)  # colour of ignored pixels, which is none of a palette
_MIN_SIDE = 144  # pixels: smaller images are enlarged by a whole factor
_MAX_SIDE = 640  # larger ones are reduced
_MARGIN, _LINE = 8, 20
_CELLS = 600  # pixels of a confusion matrix, at least
_NAMED = 40  # classes of a confusion matrix that have names beside it
_LISTED = 24  # classes in the legend of a picture


def class_names(source: Any, count: int) -> Sequence[str]:
  """Names of a source's classes, or their numbers."""
  names = source.class_names
  return names if len(names) == count else [str(i) for i in range(count)]


def palette(source: Any, count: int) -> np.ndarray:
  """(count, 3) uint8 colours of a source's classes, or some that differ."""
  from hivit_jax.data import class_lists  # here: a benchmark of a step needs no data

  own = getattr(source, 'palette', None)
  return class_lists.distinct_colours(count) if own is None or len(own) != count else own


def colour(labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
  """(H, W) integers -> (H, W, 3) uint8; white where a label is no class."""
  known = (labels >= 0) & (labels < len(colours))
  table = np.concatenate([colours, np.array([_UNKNOWN], np.uint8)])
  return table[np.where(known, labels.astype(np.int32), len(colours))]


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
  """Image (H, W, 3 or 1) and colours of its labels, half each."""
  mixed = (image.astype(np.uint16) + colour(labels, colours)) // 2
  return mixed.astype(np.uint8)


def legend(names: Sequence[str], colours: np.ndarray, chosen: Sequence[int]) -> Image.Image:
  """The colours of some classes, with their names."""
  font = default_font()
  columns = max(1, math.ceil(len(chosen) / 30))
  width = 40 + int(max((font.getlength(names[i]) for i in chosen), default=0))
  lines = math.ceil(len(chosen) / columns)
  canvas = Image.new('RGB', (width * columns + _MARGIN, lines * _LINE + 2 * _MARGIN), 'white')
  pen = ImageDraw.Draw(canvas)
  for place, index in enumerate(chosen):
    column, line = divmod(place, max(lines, 1))
    left, top = _MARGIN + column * width, _MARGIN + line * _LINE
    pen.rectangle((left, top + 2, left + 18, top + 16), tuple(map(int, colours[index])), 'black')
    pen.text((left + 26, top), names[index], 'black', font)
  return canvas


def draw(
  shown: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
  names: Sequence[str],
  colours: np.ndarray,
  title: str,
  ignore_index: int,
) -> Image.Image:
  """One row an image: image, truth, prediction, prediction over the image; a legend below.

  Args:
    shown: images (H, W, 3 or 1) uint8, label maps and predictions (H, W).
    names, colours: of the classes.
    title: above all.
    ignore_index: label of pixels that do not count; white.
  """
  panels, present = [], set()
  for image, truth, found in shown:
    truth = np.where(truth == ignore_index, -1, truth.astype(np.int32))
    present |= {*np.unique(found).tolist(), *np.unique(truth[truth >= 0]).tolist()}
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    arrays = (image, colour(truth, colours), colour(found, colours), overlay(image, found, colours))
    panels.append([_scaled(Image.fromarray(array)) for array in arrays])
  listed = sorted(present)[:_LISTED]
  key = legend(names, colours, listed)
  widths = [max(row[i].width for row in panels) + _MARGIN for i in range(4)]
  head = _MARGIN + 2 * _LINE
  heights = [row[0].height + _MARGIN for row in panels]
  size = (max(sum(widths) + _MARGIN, key.width), head + sum(heights) + key.height)
  canvas = Image.new('RGB', size, 'white')
  pen, font = ImageDraw.Draw(canvas), default_font()
  pen.text((_MARGIN, _MARGIN // 2), title, 'black', font)
  for i, label in enumerate(('image', 'truth (white: ignored)', 'prediction', 'overlay')):
    left = _MARGIN + sum(widths[:i])
    pen.text((left, head - _LINE), label, 'black', font)
    for j, row in enumerate(panels):
      canvas.paste(row[i], (left, head + sum(heights[:j])))
  canvas.paste(key, (0, head + sum(heights)))
  return canvas


def _scaled(image: Image.Image) -> Image.Image:
  short, long = min(image.size), max(image.size)
  factor = max(1, -(-_MIN_SIDE // short))
  if long > _MAX_SIDE:
    factor = _MAX_SIDE / long
  size = tuple(max(1, round(side * factor)) for side in image.size)
  return image.resize(size, Image.Resampling.NEAREST)  # pyright: ignore[reportArgumentType]


def confusion(matrix: np.ndarray, names: Sequence[str]) -> Image.Image:
  """Shares of each class's pixels, a row a class, by what they were taken for; dark is much."""
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  cell = max(2, -(-_CELLS // len(matrix)))
  levels = (255 * (1 - np.sqrt(shares))).astype(np.uint8)  # a root, so that few are seen as well
  tinted = np.stack([levels, levels, np.maximum(levels, 96)], axis=-1)
  grid = Image.fromarray(tinted.repeat(cell, axis=0).repeat(cell, axis=1))
  font = default_font()
  named = len(names) <= _NAMED
  longest = int(max(map(font.getlength, names))) + 2 if named else 0
  left = 2 * _MARGIN + longest
  top = 2 * _LINE + _MARGIN + longest
  size = (left + grid.width + _MARGIN, top + grid.height + _MARGIN)
  canvas = Image.new('RGB', size, 'white')
  canvas.paste(grid, (left, top))
  pen = ImageDraw.Draw(canvas)
  text = 'rows: what pixels are; columns: what they were taken for'
  pen.text((_MARGIN, _MARGIN), text, 'black', font)
  if named:
    for i, name in enumerate(names):
      pen.text((_MARGIN, top + i * cell + (cell - 14) // 2), name, 'black', font)
      above = Image.new('RGB', (longest, 15), 'white')
      ImageDraw.Draw(above).text((0, 0), name, 'black', font)
      canvas.paste(
        above.rotate(90, expand=True), (left + i * cell + (cell - 15) // 2, top - longest - 4)
      )
  return canvas
