"""Decoding and augmenting large photographs, with and without `data.reduce_jpegs`.

The photograph is made of small ones side by side, so that it has the detail of a real one. One
thread; times are CPU time.
"""

import io
import statistics
import time
from typing import Any

from PIL import Image

from hivit_jax.data.order import generator
from hivit_jax.data.transforms import train_transform
from hivit_jax.tools.photographs import PHOTO_SIZE, photo_files

_ACROSS = (2, 4, 8)  # photographs side by side, and one below the other


def _large(across: int) -> bytes:
  width, height = PHOTO_SIZE
  photos = [Image.open(io.BytesIO(file)) for file in photo_files()]
  whole = Image.new('RGB', (across * width, across * height))
  for i in range(across * across):
    row, column = divmod(i, across)
    whole.paste(photos[(i + row) % len(photos)], (column * width, row * height))
  buffer = io.BytesIO()
  whole.save(buffer, 'JPEG', quality=90)
  return buffer.getvalue()


def measure(images: int = 24, size: int = 224) -> dict[str, Any]:
  """Measures both ways on photographs of several sizes, in turns.

  Args:
    images: of each size; one more warms up.
    size: side of the output in pixels.

  Returns:
    `ms`, median milliseconds an image by 'WIDTHxHEIGHT': of decoding `whole`, and `reduced`.
  """
  ways = {'whole': train_transform(size), 'reduced': train_transform(size, reduce_jpegs=True)}
  ms = {}
  for across in _ACROSS:
    times: dict[str, list[float]] = {way: [] for way in ways}
    file = _large(across)
    for i in range(images + 1):
      for way, transform in ways.items():
        start = time.thread_time()
        transform({'image': file}, generator(0, i))
        times[way].append(1e3 * (time.thread_time() - start))
    name = '{}x{}'.format(*(across * side for side in PHOTO_SIZE))
    ms[name] = {way: statistics.median(own[1:]) for way, own in times.items()}
  return {'ms': ms, 'images': images, 'image_size': size}


def format_report(report: dict[str, Any]) -> str:
  """The result of `measure` as a few lines for a person."""
  size = report['image_size']
  lines = [
    f'JPEGs of large photographs to {size}x{size}, as in pretraining, one thread; medians of '
    f'{report["images"]} images',
    f'{"ms (CPU time)":24}{"decoded whole":>16}{"data.reduce_jpegs":>20}{"faster":>10}',
  ]
  for name, ms in report['ms'].items():
    whole, reduced = ms['whole'], ms['reduced']
    lines.append(f'{name:24}{whole:16.1f}{reduced:20.1f}{whole / reduced:9.1f}x')
  return '\n'.join(lines)
