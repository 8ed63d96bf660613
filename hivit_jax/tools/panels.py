"""Sheets of small pictures with a line of text below each."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hivit_jax.tasks.fonts import default_font

SIDE = 192  # pixels: larger images are reduced to it, smaller ones enlarged by a whole factor
_MARGIN, _LINE = 8, 20


class Panel(NamedTuple):
  """A picture and what is written below it."""

  picture: Image.Image
  text: str


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
  """(width, height) in which an image of (height, width) is shown."""
  height, width = size
  factor = SIDE / max(size)
  factor = factor if factor < 1 else int(factor)
  return max(1, round(width * factor)), max(1, round(height * factor))


def of_image(
  image: np.ndarray, boxes: Sequence[tuple[float, float, float, float]] = ()
) -> Image.Image:
  """An image (H, W, C) uint8, with red frames at (left, top, right, bottom), in its pixels."""
  height, width, channels = image.shape
  size = shown_size((height, width))
  way = Image.Resampling.NEAREST if size[0] >= width else Image.Resampling.LANCZOS
  pixels = image if channels == 3 else np.repeat(image[..., :1], 3, axis=-1)
  picture = Image.fromarray(pixels).resize(size, way)
  pen, factor = ImageDraw.Draw(picture), size[0] / width
  for box in boxes:
    left, top, right, bottom = (round(side * factor) for side in box)
    right, bottom = max(right, left + 2), max(bottom, top + 2)  # of a small unit, a dot
    pen.rectangle((left - 1, top - 1, right, bottom), outline='white')
    pen.rectangle((left, top, right - 1, bottom - 1), outline='red')
  return picture


def of_colours(colours: np.ndarray, size: tuple[int, int]) -> Image.Image:
  """A map (h, w, 3) in [0, 1] of an image of (height, width) pixels."""
  pixels = np.rint(255 * colours).astype(np.uint8)
  return Image.fromarray(pixels).resize(shown_size(size), Image.Resampling.NEAREST)


def of_values(values: np.ndarray, size: tuple[int, int], low: float, high: float) -> Image.Image:
  """A map (h, w) of numbers: from `low`, dark blue, to `high`, yellow."""
  share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
  return of_colours(matplotlib.colormaps['viridis'](share)[..., :3], size)


def sheet(rows: Sequence[Sequence[Panel]], title: str) -> Image.Image:
  """Draws rows of panels on white, below a title."""
  font = default_font()
  width = max(panel.picture.width for row in rows for panel in row)
  heights = [max(panel.picture.height for panel in row) for row in rows]
  columns = max(map(len, rows))
  across = _MARGIN + columns * (width + _MARGIN)
  across = max(across, int(font.getlength(title)) + 2 * _MARGIN)
  down = _MARGIN + _LINE + sum(height + _LINE + _MARGIN for height in heights)
  canvas = Image.new('RGB', (across, down), 'white')
  pen = ImageDraw.Draw(canvas)
  pen.text((_MARGIN, _MARGIN // 2), title, 'black', font)
  top = _MARGIN + _LINE
  for row, height in zip(rows, heights, strict=True):
    for i, panel in enumerate(row):
      left = _MARGIN + i * (width + _MARGIN)
      canvas.paste(panel.picture, (left, top))
      text = fit(panel.text, font, width)
      pen.text((left, top + panel.picture.height + 2), text, 'black', font)
    top += height + _LINE + _MARGIN
  return canvas


def fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
  """The text, or as much of its beginning as fits before an ellipsis."""
  if font.getlength(text) <= width:
    return text
  while text and font.getlength(f'{text}...') > width:
    text = text[:-1]
  return f'{text}...'
