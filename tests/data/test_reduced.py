"""JPEGs at reduced size: how far the pixels may be from those of the whole image."""

import io

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data.decode import BrokenImage, decode_image
from hivit_jax.data.fields import decode
from hivit_jax.data.reduced import Reducible, reducible
from hivit_jax.data.transforms import train_transform
from hivit_jax.tools.photographs import PHOTO_SIZE, photo_files

BICUBIC = Image.Resampling.BICUBIC
BOX = (61, 13, 61 + 341, 13 + 343)  # of a photograph; no side of it is a multiple of 2


def turned(file: bytes, orientation: int, size=PHOTO_SIZE) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = orientation
  buffer = io.BytesIO()
  Image.open(io.BytesIO(file)).crop((0, 0, *size)).save(buffer, 'JPEG', exif=exif, quality=95)
  return buffer.getvalue()


def difference(file: bytes, side: int, channels: int = 3, box=BOX) -> np.ndarray:
  exact = decode_image(file, channels=channels).crop(box).resize((side, side), BICUBIC)
  reduced = reducible(file, channels).crop(box).resize((side, side), BICUBIC)
  assert reduced.mode == exact.mode
  return np.abs(np.asarray(reduced, int) - np.asarray(exact, int))


@pytest.mark.parametrize('channels', [3, 1])
@pytest.mark.parametrize(
  'side', [113, 72, 56, 36]
)  # at 1/2 and at 1/4: as small as it may be, less
def test_pixels_of_photographs_are_within_the_documented_bound(side, channels):
  for file in photo_files():
    apart = difference(file, side, channels)
    assert 0 < apart.mean() < 2
    assert np.percentile(apart, 99) <= 10


@pytest.mark.parametrize('side', [114, 200, 400])
def test_where_nothing_can_be_left_out_the_pixels_are_exactly_the_same(side):
  assert not difference(photo_files()[0], side).any()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_the_crop_is_where_it_should_be_however_the_photograph_was_held(orientation):
  file = turned(photo_files()[0], orientation, (500, 372))
  assert reducible(file, 3).size == decode_image(file).size
  apart = difference(file, 72, box=(13, 57, 13 + 341, 57 + 315))
  assert 0 < apart.mean() < 2


def test_a_turned_photograph_whose_size_does_not_divide_is_decoded_as_a_whole():
  assert not difference(turned(photo_files()[0], 6, (499, 375)), 72, box=(13, 57, 354, 400)).any()


def test_a_crop_of_a_crop_counts_from_the_first():
  whole = reducible(photo_files()[0], 3)
  inner = whole.crop(BOX).crop((3, 5, 103, 205))
  assert inner.box == (64, 18, 164, 218)
  assert inner.size == (100, 200)


def test_augmentation_draws_the_same_crops_and_flips():
  for seed in range(4):
    exact, reduced = (
      train_transform(56, reduce_jpegs=on)({'image': photo_files()[1]}, np.random.default_rng(seed))
      for on in (False, True)
    )
    assert np.abs(exact['image'].astype(int) - reduced['image']).mean() < 2


def test_other_files_and_images_with_targets_are_decoded_at_once():
  photo = photo_files()[0]
  png = io.BytesIO()
  Image.new('RGB', (8, 8)).save(png, 'PNG')
  labels = np.zeros(PHOTO_SIZE[::-1], np.uint8)
  examples = [{'image': photo}, {'image': png.getvalue()}, {'image': photo, 'segmentation': labels}]
  kinds = [
    type(decode(example, tuple(example), 3, reduce_jpegs=True)['image']) for example in examples
  ]
  assert [kind is Reducible for kind in kinds] == [True, False, False]


def test_damaged_files_are_broken_images():
  with pytest.raises(BrokenImage):
    reducible(b'\xff\xd8 and no more', 3)
  cut = reducible(photo_files()[0][:20_000], 3)
  with pytest.raises(BrokenImage, match='truncated'):
    cut.resize((50, 50), BICUBIC)
