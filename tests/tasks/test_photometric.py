"""Photometric distortion against OpenCV's, as mmsegmentation uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.tasks import photometric
from tests.helpers import load_golden, optimized

# OpenCV computes 32 pixels of a row at a time and the rest one by one, where its way back from HSV
# rounds instead of cutting off.
EXACT = 32
CONFIG, ARRAYS = load_golden('segmentation_transforms.npz')
distort = jax.jit(photometric.distort)


@pytest.fixture(autouse=True)
def _as_users_run_it():
  """To the last bit: without optimisations one number in 4000 is one away from OpenCV's."""
  with optimized():
    yield


def _drawn(b=np.nan, c=np.nan, s=np.nan, h=np.nan, mode=1):
  numbers = [np.float32([x]) for x in (b, c, s, h)]
  return photometric.Draw(*numbers[:2], np.array([mode == 1]), *numbers[2:])


@pytest.mark.parametrize('name', CONFIG['photometric'])
def test_each_step_and_all_of_them(name):
  drawn = _drawn(**CONFIG['photometric'][name])
  found = np.asarray(distort(ARRAYS['photometric/image_rgb'][None], drawn))[0].astype(int)
  expected = ARRAYS[f'photometric/{name}']
  np.testing.assert_array_equal(found[:, :EXACT], expected[:, :EXACT])
  apart = np.abs(found - expected)
  assert apart.max() <= (1 if not name.startswith('all') else 4)
  if name.startswith(('brightness', 'contrast')):
    assert not apart.any()


def test_hsv_there_and_back():
  np.testing.assert_array_equal(
    photometric._to_hsv(jnp.asarray(ARRAYS['hsv/rgb'], jnp.int32)), ARRAYS['hsv/hsv']
  )
  back = jax.jit(photometric._to_rgb)(jnp.asarray(ARRAYS['hsv/hsv'], jnp.int32))
  np.testing.assert_array_equal(back, ARRAYS['hsv/back_rgb'])


def test_draws_have_the_published_ranges_and_are_on_for_half_of_the_images():
  drawn = photometric.draw(jax.random.key(0), 4000)
  for amounts, low, high in (
    (drawn.brightness, -32, 32),
    (drawn.contrast, 0.5, 1.5),
    (drawn.saturation, 0.5, 1.5),
    (drawn.hue, -18, 17),
  ):
    known = amounts[~np.isnan(amounts)]
    assert abs(len(known) / 4000 - 0.5) < 0.03
    assert low <= known.min() < low + 0.02 * (high - low)
    assert high - 0.02 * (high - low) < known.max() <= high
  assert set(np.unique(drawn.hue[~np.isnan(drawn.hue)])) == set(range(-18, 18))
  assert abs(drawn.contrast_first.mean() - 0.5) < 0.03


def test_every_image_has_its_own_draw():
  images = np.broadcast_to(ARRAYS['photometric/image_rgb'], (2, 40, 55, 3))
  one, two = _drawn(b=12.5, c=1.3, s=0.6, h=-9), _drawn(b=-20.0, mode=0)
  both = photometric.Draw(*(np.concatenate(pair) for pair in zip(one, two, strict=True)))
  found = distort(images, both)
  np.testing.assert_array_equal(found[:1], distort(images[:1], one))
  np.testing.assert_array_equal(found[1:], distort(images[:1], two))
