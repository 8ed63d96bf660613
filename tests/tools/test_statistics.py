"""tools.statistics: numbers of every channel, and the settings that they are for."""

import numpy as np
import pytest

from hivit_jax.errors import UserError
from hivit_jax.tools import statistics
from tests.data.noise import png


class Arrays:
  name, split, class_names, num_classes = 'arrays', 'train', (), 0

  def __init__(self, images):
    self.images = images

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> dict:
    return {'image': self.images[index]}

  def example_name(self, index: int) -> str:
    return f'arrays/{index}'


def test_moments_and_range_of_every_channel_in_units_of_the_settings():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 65536, (5, 6, 9, 13)).astype(np.uint16)
  images[..., 12] = 7
  found = statistics.measure(Arrays([*images, b'broken']), 0)
  scaled = images.reshape(-1, 13) / 65535
  for own, expected in (
    (found.mean, scaled.mean(0)), (found.std, scaled.std(0)),
    (found.least, scaled.min(0)), (found.most, scaled.max(0)),
  ):  # fmt: skip
    np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-12)
  assert (found.dtype, found.images, found.broken) == ('uint16', 5, 1)
  text = statistics.report(found)
  flags = dict(part.split('=') for part in text.splitlines()[-1].split())
  assert flags['--config.channels'] == '13'
  assert flags['--config.data.dtype'] == 'uint16'
  assert len(flags['--config.data.mean'].split(',')) == 13
  assert flags['--config.data.std'].split(',')[-1] == '1'
  assert 'without any variation' in text


def test_floats_are_as_they_are_and_far_from_zero_nothing_is_lost():
  images = np.random.default_rng(1).normal(1e5, 0.5, (4, 8, 8)).astype(np.float32)
  found = statistics.measure(Arrays(images), 0)
  np.testing.assert_allclose(found.mean, images.mean(dtype=np.float64), rtol=1e-12)
  np.testing.assert_allclose(found.std, images.std(dtype=np.float64), rtol=1e-6)
  assert statistics.measure(Arrays(images), 2).images == 2


def test_pictures_are_rgb_unless_all_are_grey():
  colour, grey = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)
  for images, channels in (([grey, colour], 3), ([grey, grey], 1), ([colour], 3)):
    found = statistics.measure(Arrays(list(map(png, images))), 0)
    assert (len(found.mean), found.dtype) == (channels, 'uint8')


def test_an_image_of_another_kind_is_named():
  images = [np.zeros((4, 4, 5), np.uint16), np.zeros((4, 4, 4), np.uint16)]
  with pytest.raises(UserError, match=r'arrays/1: uint16 of shape \(4, 4, 4\)'):
    statistics.measure(Arrays(images), 0)
  with pytest.raises(UserError, match=r'none of 1 images of arrays can be read, such as arrays/0'):
    statistics.measure(Arrays([b'broken']), 0)
