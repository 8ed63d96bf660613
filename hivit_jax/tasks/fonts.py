"""The font of all pictures."""

from PIL import ImageFont

from hivit_jax.data.builders.packages import package_file


def default_font() -> ImageFont.FreeTypeFont:
  """DejaVu Sans, which comes with matplotlib: Pillow's own font has no letters but English ones."""
  return ImageFont.truetype(package_file('matplotlib', 'mpl-data/fonts/ttf/DejaVuSans.ttf'), 12)
