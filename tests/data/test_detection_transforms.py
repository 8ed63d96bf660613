"""Images with objects: against mmdetection's transforms, and what they do not show."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data import detection_transforms as transforms
from hivit_jax.data.decode import BrokenImage
from hivit_jax.errors import UserError
from hivit_jax.tasks.images import normalize_padded
from tests.helpers import assert_close, load_golden

CONFIG, ARRAYS = load_golden('detection_augment.npz')


def unpack(packed, size):
  return np.unpackbits(packed, axis=1)[:, : size[0] * size[1]].reshape(-1, *size)


@pytest.fixture
def scene():
  masks = unpack(ARRAYS['masks'], (CONFIG['height'], CONFIG['width']))
  crowd = np.zeros(len(masks), bool)
  return transforms.Scene(ARRAYS['image'], ARRAYS['boxes'], ARRAYS['labels'], masks, crowd)


def chain_of(case):
  cut = {}
  if 'first' in case:
    cut = {key: tuple(case[key]) for key in ('first', 'crop', 'offset')}
  return transforms.Chain(case['flip'], *case['scale'], **cut)


@pytest.mark.parametrize('number', range(len(CONFIG['cases'])))
def test_chains_equal_the_official_ones(scene, number):
  case = CONFIG['cases'][number]
  chain = chain_of(case)
  found = chain(scene)
  size = tuple(case['shape'])
  assert found.size == chain.size(scene.size) == size
  differ = np.abs(found.image - ARRAYS[f'{number}/image'].astype(np.int32))
  assert differ.max() <= 1
  np.testing.assert_allclose(found.boxes, ARRAYS[f'{number}/boxes'], atol=1e-4)
  np.testing.assert_array_equal(found.labels, ARRAYS[f'{number}/labels'])
  np.testing.assert_array_equal(found.masks, unpack(ARRAYS[f'{number}/masks'], size))


def test_a_normalised_and_padded_image_equals_the_official_one(scene):
  """By ImageNet's statistics, with zeros beside it and not the colour that black becomes."""
  (case,) = (case for case in CONFIG['cases'] if 'final' in case)
  found = chain_of(case)(scene)
  image = dataclasses.replace(found, image=ARRAYS['3/image'])  # a grey level apart in some pixels
  arrays = transforms.to_arrays(image, tuple(case['pad_shape']), 6)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  (final,) = normalize_padded(arrays['image'][None], arrays['size'][None], mean, std)
  assert_close(final[::3, ::3], ARRAYS['3/final'])


@pytest.mark.parametrize('number', range(len(CONFIG['cases'])))
def test_crops_of_masks_are_those_of_whole_bitmaps(scene, number):
  """As products with the share of each pixel in each cell, which is what a crop means."""
  found = chain_of(CONFIG['cases'][number])(scene)
  arrays = transforms.to_arrays(found, found.size, 6)
  for bitmap, box, crop in zip(found.masks, found.boxes, arrays['masks'], strict=False):
    x1, y1, x2, y2 = box.astype(np.float64)
    down, across = (np.arange(pixels) for pixels in bitmap.shape)
    down, across = shares(y1, y2, down), shares(x1, x2, across)
    np.testing.assert_allclose(crop, 255 * down @ bitmap @ across.T, atol=0.501)


def shares(start, stop, pixels):
  """(cells, pixels): how much of each of 112 equal parts of an interval a pixel covers."""
  edges = np.linspace(start, stop, 113)
  common = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
  return common.clip(0) / np.diff(edges)[:, None]


PUBLISHED = transforms.Augmentation(
  short=tuple(range(480, 801, 32)), long=1333, first=(400, 500, 600)
)


def test_the_published_augmentation_keeps_within_its_bounds():
  rng = np.random.default_rng(0)
  chains = [PUBLISHED.draw((480, 640), rng.random(transforms.DRAWS)) for _ in range(400)]
  sizes = np.array([chain.size((480, 640)) for chain in chains])
  assert sizes.max() <= 1333
  assert sizes.min(axis=1).max() <= 800
  cropped = np.array([chain.first is not None for chain in chains])
  assert 0.4 < cropped.mean() < 0.6
  assert 0.4 < np.mean([chain.flip for chain in chains]) < 0.6
  assert {chain.short for chain in chains} == set(PUBLISHED.short)
  for chain in chains:
    if chain.first:
      sides = transforms.fitted((480, 640), *chain.first)
      for side, length, start in zip(sides, chain.crop, chain.offset, strict=True):
        assert min(side, 384) <= length <= min(side, 600)
        assert 0 <= start <= side - length


JITTER = transforms.ScaleJitter((0.1, 2.0), 128)


def test_jitter_resizes_within_its_range_and_cuts_to_the_square():
  rng = np.random.default_rng(0)
  draws = rng.random((500, transforms.DRAWS))
  chains = [JITTER.draw((90, 120), own) for own in draws]
  factors = np.array([chain.first[1] / 128 for chain in chains])
  assert 0.1 <= factors.min() < 0.15
  assert 1.95 < factors.max() <= 2
  for chain in chains:
    whole = transforms.fitted((90, 120), *chain.first)
    assert chain.crop == tuple(np.minimum(whole, 128))
    assert chain.size((90, 120)) == chain.crop
    assert all(
      0 <= start <= side - length
      for start, side, length in zip(chain.offset, whole, chain.crop, strict=True)
    )
  assert 0.4 < np.mean([chain.flip for chain in chains]) < 0.6
  sizes = np.tile([90, 120], (500, 1))
  np.testing.assert_array_equal(JITTER.sizes(sizes, draws), [chain.crop for chain in chains])
  corners = {chain.offset for chain in chains if chain.first[1] > 200}
  assert len(corners) > 10


@pytest.mark.parametrize('factor', [0.0, 0.2, 0.99])
def test_jitter_moves_boxes_and_masks_with_the_image(scene, factor):
  """The rest of the canvas is empty; a box is around its mask, up to what rounding moves."""
  draws = np.array([0.7, factor, 0.5, *[0.5] * 5])
  chain = JITTER.draw(scene.size, draws)
  found = chain(scene)
  arrays = transforms.to_arrays(found, (128, 128), 6)
  height, width = chain.crop
  assert arrays['size'].tolist() == [height, width]
  assert (max(height, width) == 128) == (factor == 0.99)
  assert not arrays['image'][height:].any()
  assert not arrays['image'][:, width:].any()
  assert len(found.labels) > 0
  stretch = chain.first[1] / 120
  for mask, box in zip(found.masks, found.boxes, strict=True):
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if len(rows):
      x1, y1, x2, y2 = box
      assert columns[0] >= x1 - stretch - 1
      assert columns[-1] + 1 <= x2 + stretch + 1
      assert rows[0] >= y1 - stretch - 1
      assert rows[-1] + 1 <= y2 + stretch + 1


def test_a_line_of_pixels_stays_one():
  assert transforms.fitted((5000, 1), 800, 1333) == (1333, 1)
  assert transforms.fitted((480, 640), 800, 1333) == (800, 1067)


def example_of(scene, **objects):
  file, instances = io.BytesIO(), io.BytesIO()
  Image.fromarray(scene.image).save(file, 'PNG')
  numbers = (scene.masks * np.arange(1, 5)[:, None, None]).max(axis=0).astype(np.uint8)
  Image.fromarray(numbers).save(instances, 'PNG')
  return {
    'image': file.getvalue(),
    'instances': instances.getvalue(),
    'objects': {'boxes': scene.boxes, 'classes': scene.labels, **objects},
  }


TRAIN = transforms.TrainTransform(transforms.Augmentation((90,), 120, flip=False), (96, 128), 6)


def test_arrays_have_objects_in_slots_and_the_image_in_the_corner(scene):
  found = TRAIN(example_of(scene), np.random.default_rng(0))
  assert found['size'].tolist() == [90, 120]
  np.testing.assert_array_equal(found['image'][:90, :120], scene.image)
  assert not found['image'][90:].any()
  assert not found['image'][:, 120:].any()
  assert found['exists'].tolist() == 4 * [True] + 2 * [False]
  np.testing.assert_array_equal(found['boxes'][:4], scene.boxes)
  assert not found['boxes'][4:].any()
  areas = [(m / 255).mean() * np.prod(b[2:] - b[:2]) for m, b in zip(
    found['masks'][:4], scene.boxes, strict=True
  )]  # fmt: skip
  np.testing.assert_allclose(areas, scene.masks.sum(axis=(1, 2)), rtol=0.02)


def test_crowds_and_slivers_are_not_learned_and_of_too_many_objects_the_largest_are(scene):
  found = TRAIN(
    example_of(scene, crowd=np.array([True, False, False, False])), np.random.default_rng(0)
  )
  assert found['labels'][found['exists']].tolist() == scene.labels[1:].tolist()
  thin = scene.boxes.copy()
  thin[1, 2] = thin[1, 0] + 0.5
  slim = transforms.to_arrays(
    transforms.Scene(scene.image, thin, scene.labels, scene.masks, scene.crowd), (96, 128), 2
  )
  areas = np.prod(thin[:, 2:] - thin[:, :2], axis=1) * (np.arange(4) != 1)
  largest = np.sort(np.argsort(-areas)[:2])
  assert slim['labels'].tolist() == scene.labels[largest].tolist()


def test_evaluation_keeps_the_size_of_the_original(scene):
  transform = transforms.EvalTransform(45, 120, (64, 64))
  found = transform(example_of(scene))
  assert found['original'].tolist() == [90, 120]
  assert found['size'].tolist() == [45, 60]
  assert found['image'].shape == (64, 64, 3)


def test_mistakes_are_named(scene):
  example = example_of(scene)
  rng = np.random.default_rng(0)
  with pytest.raises(UserError, match=r"no 'objects' to find.*image"):
    TRAIN({'image': example['image']}, rng)
  with pytest.raises(UserError, match="neither 'masks' nor"):
    TRAIN({key: example[key] for key in ('image', 'objects')}, rng)
  with pytest.raises(UserError, match=r'90x120 pixels, more than the 64x64'):
    transforms.TrainTransform(TRAIN.augmentation, (64, 64))(example, rng)
  small = io.BytesIO()
  Image.fromarray(np.zeros((9, 9), np.uint8)).save(small, 'PNG')
  with pytest.raises(BrokenImage, match='120x90 pixels, its masks 9x9'):
    TRAIN({**example, 'instances': small.getvalue()}, rng)
