"""The font of all pictures."""

import importlib.util
import pathlib

from PIL import ImageFont


def default_font() -> ImageFont.FreeTypeFont:
  """DejaVu Sans, which comes with matplotlib: Pillow's own font has no letters but English ones."""
  package = importlib.util.find_spec('matplotlib')  # importing it takes a second
  assert package
  assert package.origin
  file = pathlib.Path(package.origin).with_name('mpl-data') / 'fonts/ttf/DejaVuSans.ttf'
  return ImageFont.truetype(file, 12)
