"""The input pipeline for images of many channels and bits, beside the one for photographs.

All have the same size and go through the augmentation of pretraining, in one thread. Times are CPU
time; .npy files are read from memory, as JPEG files are.
"""

import io
import statistics
import time
from typing import Any

import numpy as np

from hivit_jax.data.order import generator
from hivit_jax.data.transforms import train_transform
from hivit_jax.tools.photographs import PHOTO_SIZE, photo_files

# Name -> what is stored: type, channels.
KINDS = {
  'JPEG, 3 channels of 8 bits': ('uint8', 3),
  '.npy, 1 channel of 32 bits': ('float32', 1),
  '.npy, 4 channels of 16 bits': ('uint16', 4),
  '.npy, 13 channels of 16 bits': ('uint16', 13),
}


def measure(images: int = 64, size: int = 224) -> dict[str, Any]:
  """Measures each of `KINDS`, in turns.

  Args:
    images: of each; one more warms up.
    size: side of the output in pixels.

  Returns:
    `ms`, the median milliseconds of an image of each, and `images`.
  """
  width, height = PHOTO_SIZE
  rng = np.random.default_rng(0)
  transforms, examples = {}, {}
  for name, (dtype, channels) in KINDS.items():
    transforms[name] = train_transform(size, channels=channels, dtype=dtype)
    if name.startswith('JPEG'):
      examples[name] = photo_files()[0]
      continue
    buffer = io.BytesIO()
    np.save(buffer, rng.integers(0, 10_000, (height, width, channels)).astype(dtype))
    examples[name] = buffer.getvalue()
  times: dict[str, list[float]] = {name: [] for name in KINDS}
  for i in range(images + 1):
    for name, transform in transforms.items():
      start = time.thread_time()
      transform({'image': examples[name]}, generator(0, i))
      times[name].append(1e3 * (time.thread_time() - start))
  return {
    'ms': {name: statistics.median(own[1:]) for name, own in times.items()},
    'images': images,
    'photo_size': list(PHOTO_SIZE),
    'image_size': size,
  }


def format_report(report: dict[str, Any]) -> str:
  """The result of `measure` as a few lines for a person."""
  width, height = report['photo_size']
  lines = [
    f'{width}x{height} pixels to {report["image_size"]}x{report["image_size"]}, as in pretraining, '
    f'one thread; medians of {report["images"]} images',
    f'{"":32}{"ms (CPU time)":>16}{"images/s per core":>20}',
  ]
  lines += [f'{name:32}{ms:16.2f}{1e3 / ms:20.0f}' for name, ms in report['ms'].items()]
  return '\n'.join(lines)
