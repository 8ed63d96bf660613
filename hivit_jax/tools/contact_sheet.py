"""Pictures of images with the classes predicted for them."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from hivit_jax.tasks.fonts import default_font
from hivit_jax.tools.panels import fit

_COLUMNS = 5
_SIDE = 192  # pixels: smaller images are enlarged about so far, by a whole factor
_MIN_WIDTH = 224  # of a cell, for the names
_MARGIN = 8
_LINE = 20
_BAR = '#9ecae1'


class Predicted(NamedTuple):
  """An image (H, W, C) uint8 as the model got it, and its classes with their probabilities."""

  file: str
  image: np.ndarray
  classes: Sequence[tuple[str, float]]


def draw(rows: Sequence[Predicted]) -> Image.Image:
  """Draws each image over its file name and its classes, a bar's length being the probability.

  Args:
    rows: at least one; images of one size, the same number of classes each.
  """
  h, w, _ = rows[0].image.shape
  scale = max(1, round(_SIDE / max(h, w)))
  cell_w = max(w * scale, _MIN_WIDTH)
  cell_h = h * scale + _LINE * (1 + len(rows[0].classes))
  columns = min(_COLUMNS, math.ceil(math.sqrt(len(rows))))
  count = math.ceil(len(rows) / columns)
  size = (columns * (cell_w + _MARGIN) + _MARGIN, count * (cell_h + 2 * _MARGIN) + _MARGIN)
  sheet = Image.new('RGB', size, 'white')
  pen = ImageDraw.Draw(sheet)
  font = default_font()
  for i, row in enumerate(rows):
    left = _MARGIN + i % columns * (cell_w + _MARGIN)
    top = _MARGIN + i // columns * (cell_h + 2 * _MARGIN)
    pixels = row.image if row.image.shape[-1] == 3 else row.image[..., 0]
    sheet.paste(
      Image.fromarray(pixels).resize((w * scale, h * scale), Image.Resampling.NEAREST), (left, top)
    )
    top += h * scale
    pen.text((left, top), fit(os.path.basename(row.file), font, cell_w), 'black', font)
    for label, probability in row.classes:
      top += _LINE
      bar = round((cell_w - 1) * probability)
      pen.rectangle((left, top, left + bar, top + _LINE - 3), _BAR)
      share = f'{100 * probability:.1f} %'
      room = cell_w - font.getlength(share) - 2 * _MARGIN
      pen.text((left + 3, top), fit(label, font, room), 'black', font)
      pen.text((left + cell_w - 3, top), share, 'black', font, anchor='ra')
  return sheet
