"""Measures mean, standard deviation and range of each channel of a data set.

  python -m hivit_jax.tools.statistics /data/fields
  python -m hivit_jax.tools.statistics eurosat/all --data_dir=/data/tfds --split=train[:90%]

The data set is a folder or any `config.data.name`. The last line has the settings for a run: number
and type of the channels, and their statistics in the units of `config.data.mean`: integers divided
by the range of their type, floats as they are.
"""

import dataclasses
import os
from typing import Any

import numpy as np
from absl import flags

from hivit_jax import cli, settings
from hivit_jax.data import fields, pixels
from hivit_jax.data.decode import NUMPY_FILES, BrokenImage
from hivit_jax.data.sources.base import Source, open_source
from hivit_jax.errors import UserError, flag
from hivit_jax.tasks.images import full_range

_SPLIT = flags.DEFINE_string('split', 'train', 'Split, as in config.data.train_split.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where prepared data sets are.')
_SAMPLE = flags.DEFINE_integer('sample', 1000, 'Images to measure; 0: all.', lower_bound=0)
_CHANNELS = flags.DEFINE_integer(
  'channels', None, 'Of the images; default: as many as the first ones have.'
)
_DTYPE = flags.DEFINE_enum('dtype', None, settings.DTYPES, 'Of their pixels; default: as stored.')

_PROBED = 16  # images that decide whether pictures are grey


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What was measured of a sample.

  Attributes:
    dtype: of stored pixels.
    images, broken: numbers of images measured, and of those that could not be read.
    mean, std, least, most: (C,) float64, of scaled pixels.
  """

  dtype: str
  images: int
  broken: int
  mean: np.ndarray
  std: np.ndarray
  least: np.ndarray
  most: np.ndarray


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    raise UserError('give a data set: python -m hivit_jax.tools.statistics /data/fields')
  name = f'folder:{argv[1]}' if os.path.isdir(os.path.expanduser(argv[1])) else argv[1]
  source = open_source(name, _SPLIT.value, _DATA_DIR.value)
  found = measure(source, _SAMPLE.value, channels=_CHANNELS.value, dtype=_DTYPE.value)
  print(f'{found.images} of {len(source)} images of {source.name} ({source.split})')
  print(report(found))


def measure(
  source: Source, sample: int, *, channels: int | None = None, dtype: str | None = None
) -> Statistics:
  """Decodes a random sample and sums it up.

  Args:
    source: the images.
    sample: how many; 0: all.
    channels, dtype: of the images; None: see `kind_of`.

  Raises:
    UserError: an image has other channels or another type, or none can be read.
  """
  count = min(sample or len(source), len(source))
  chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
  channels, dtype = kind_of(source, chosen[:_PROBED], channels, dtype)
  images = pixel_count = 0
  shift: Any = None  # near the mean, so that squares of small differences are summed
  sums, squares = np.zeros(channels), np.zeros(channels)
  least, most = np.full(channels, np.inf), np.full(channels, -np.inf)
  reason = ''
  for index in map(int, chosen):
    try:
      example = fields.decode({'image': source[index]['image']}, ('image',), channels, dtype)
    except (BrokenImage, OSError, RuntimeError) as error:
      reason = f'{source.example_name(index)} ({error})'
      continue
    except UserError as error:
      raise UserError(f'{source.example_name(index)}: {error}') from error
    scaled = fields.to_arrays(example)['image'].reshape(-1, channels) / full_range(np.dtype(dtype))
    shift = scaled.mean(axis=0) if shift is None else shift
    sums += (scaled - shift).sum(axis=0)
    squares += np.square(scaled - shift).sum(axis=0)
    least, most = np.minimum(least, scaled.min(axis=0)), np.maximum(most, scaled.max(axis=0))
    images, pixel_count = images + 1, pixel_count + len(scaled)
  if not images:
    raise UserError(f'none of {count} images of {source.name} can be read, such as {reason}')
  mean = sums / pixel_count
  std = np.sqrt(np.maximum(squares / pixel_count - mean**2, 0))
  return Statistics(dtype, images, count - images, mean + shift, std, least, most)


def kind_of(
  source: Source, probed: Any, channels: int | None = None, dtype: str | None = None
) -> tuple[int, str]:
  """Number and type of the channels of a data set's images.

  Pictures of 8 bits are RGB, or grey if all that are probed are; everything else is as the first
  image is stored.

  Args:
    source: the images.
    probed: indices of those that are looked at.
    channels, dtype: what is known already.
  """
  stored: list[np.ndarray] = []
  for index in map(int, probed):
    data = source[index]['image']
    try:
      stored.append(pixels.as_stored(data))
    except BrokenImage:
      continue
    except UserError:  # a palette, for example, which is converted to RGB
      return channels or settings.RGB, dtype or 'uint8'
    own = isinstance(data, np.ndarray) or data.startswith(NUMPY_FILES + pixels.TIFF_FILES)
    if own or stored[0].dtype != np.uint8:
      return channels or stored[0].shape[2], dtype or stored[0].dtype.name
  grey = bool(stored) and all(array.shape[2] == 1 for array in stored)
  return channels or (1 if grey else settings.RGB), dtype or 'uint8'


def report(found: Statistics) -> str:
  """A line a channel, and the settings for a run."""
  lines = [f'{found.broken} could not be read and are left out'] if found.broken else []
  lines += [f'channel {"mean":>12} {"std":>12} {"min":>12} {"max":>12}']
  for i, row in enumerate(zip(found.mean, found.std, found.least, found.most, strict=True), 1):
    lines.append(f'{i:7} ' + ' '.join(f'{number:12.6g}' for number in row))
  std = np.where(found.std > 0, found.std, 1)
  if constant := [str(i) for i, number in enumerate(found.std, 1) if not number > 0]:
    lines.append(f'without any variation, so the setting below has 1: {", ".join(constant)}')
  given = {
    'channels': len(found.mean),
    'data.dtype': found.dtype,
    'data.mean': tuple(f'{number:.6g}' for number in found.mean),
    'data.std': tuple(f'{number:.6g}' for number in std),
  }
  return '\n'.join([*lines, ' '.join(flag(key, value) for key, value in given.items())])


if __name__ == '__main__':
  cli.run(main)
