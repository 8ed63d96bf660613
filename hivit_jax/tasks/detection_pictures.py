"""Pictures of objects: their masks, boxes, classes and scores over the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hivit_jax.data import coco
from hivit_jax.tasks.fonts import default_font

_SIDE = 320  # pixels: a shorter side below is enlarged by a whole factor
_MARGIN, _LINE = 8, 20


def draw(
  image: np.ndarray,
  objects: Sequence[dict[str, Any]],
  names: Sequence[str],
  colours: np.ndarray,
) -> Image.Image:
  """The image with objects on it, the first ones above the others.

  Args:
    image: (H, W, 3) uint8; a small one is enlarged.
    objects: see `detection_results.of_batch`; those without a score are the true ones.
    names: of the classes.
    colours: (classes, 3) uint8.
  """
  height, width = image.shape[:2]
  scale = max(1, -(-_SIDE // min(height, width)))
  mixed = image.astype(np.float32)
  for one in reversed(objects):
    mask = coco.decode(one['segmentation'], (height, width)).astype(bool)
    mixed[mask] = (mixed[mask] + colours[one['category_id']]) / 2
  large = mixed.astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
  canvas = Image.fromarray(large)
  pen = ImageDraw.Draw(canvas)
  font = default_font()
  for one in reversed(objects):
    colour = tuple(map(int, colours[one['category_id']]))
    left, top, across, down = (scale * value for value in one['bbox'])
    pen.rectangle((left, top, left + across, top + down), outline=colour, width=2)
    score = f' {one["score"]:.2f}' if 'score' in one else ''
    text = f'{names[one["category_id"]]}{score}'
    length = font.getlength(text)
    x = min(max(left, 0), max(canvas.width - length - 4, 0))
    y = min(max(top, 0), canvas.height - _LINE)
    pen.rectangle((x, y, x + length + 4, y + 16), fill=colour)
    pen.text((x + 2, y), text, 'black' if sum(colour) > 380 else 'white', font)
  return canvas


def sheet(
  pairs: Sequence[tuple[Image.Image, Image.Image]], title: str, heads: tuple[str, str]
) -> Image.Image:
  """Pairs of pictures, one row each, with a head above each column."""
  widths = [max(pair[i].width for pair in pairs) + _MARGIN for i in range(2)]
  top = _MARGIN + 2 * _LINE
  height = top + sum(max(one.height for one in pair) + _MARGIN for pair in pairs)
  canvas = Image.new('RGB', (sum(widths) + _MARGIN, height), 'white')
  pen, font = ImageDraw.Draw(canvas), default_font()
  pen.text((_MARGIN, _MARGIN // 2), title, 'black', font)
  for i, head in enumerate(heads):
    pen.text((_MARGIN + i * widths[0], top - _LINE), head, 'black', font)
  for pair in pairs:
    for i, one in enumerate(pair):
      canvas.paste(one, (_MARGIN + i * widths[0], top))
    top += max(one.height for one in pair) + _MARGIN
  return canvas
