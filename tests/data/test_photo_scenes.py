"""`photo_scenes`: masks, boxes and areas are those of what is seen."""

import io

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data import fields, transforms
from hivit_jax.data.builders import photo_scenes, photo_tiles
from hivit_jax.data.builders.photo_tiles import Part
from hivit_jax.data.order import generator
from hivit_jax.data.sources.base import open_source

SIDE = photo_scenes.SIDE


@pytest.fixture(scope='module')
def source(data_dir):
  return open_source('photo_scenes', 'test', str(data_dir))


def decoded(data: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(data)))


def test_a_pixel_is_of_the_class_that_its_map_says():
  """Photographs of one colour each show where their pixels went."""
  colours = np.arange(10, 170, 10, dtype=np.uint8)
  photos = [[Part(np.full((120, 130, 3), colour, np.uint8), 0)] for colour in colours]
  horse = Image.new('L', (40, 30), 255)
  seen = set()
  for i in range(60):
    scene = photo_scenes.draw_scene(photos, i % 16, horse, generator(1, i))
    known = scene.classes != photo_scenes.IGNORED
    np.testing.assert_array_equal(scene.image[known][:, 0], colours[scene.classes[known]])
    own = np.append(colours[i % 16], colours[scene.labels])
    np.testing.assert_array_equal(scene.image[..., 1], own[scene.instances])
    seen |= set(scene.labels.tolist())
  assert seen == set(range(16))


def test_objects_are_described_by_what_is_seen_of_them(source):
  counts, borders = [], []
  for i in range(0, len(source), 8):
    example = source[i]
    classes, instances = decoded(example['segmentation']), decoded(example['instances'])
    objects = example['objects']
    assert objects['boxes'].shape == (len(objects['area']), 4)
    assert instances.max() == len(objects['area'])
    for number, (box, label, area) in enumerate(
      zip(objects['boxes'], objects['classes'], objects['area'], strict=True), 1
    ):
      assert objects['instance'][number - 1] == number
      left, top, right, bottom = box.astype(int)
      mine = instances == number
      inside = mine[top:bottom, left:right]
      assert mine.sum() == inside.sum() == area >= photo_scenes.MIN_PIXELS
      assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
      assert set(classes[mine].tolist()) <= {label, 255}
    padded = np.pad(instances, 1, mode='edge')
    border = np.zeros((SIDE, SIDE), bool)
    for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
      border |= padded[y : y + SIDE, x : x + SIDE] != instances
    np.testing.assert_array_equal(classes == 255, border)
    counts.append(len(objects['area']))
    borders.append(border.mean())
  assert set(counts) >= {1, 2, 3, 4}
  assert 0.01 < np.mean(borders) < 0.1


def test_objects_keep_their_instances_in_a_crop(source):
  """What is left out by a crop is left out of the map as well."""
  transform = transforms.train_transform(
    64, keys=('image', 'instances', 'objects'), scale=(0.2, 0.4)
  )
  dropped = 0
  for i in range(20):
    decoded = fields.decode(source[i], transform.keys, 3)
    rng = np.random.default_rng(i)
    for step in transform.steps:
      decoded = step(decoded, rng)
    seen = set(np.unique(np.asarray(decoded['instances'])).tolist()) - {0}
    # A sliver may be lost by resizing, so that an object is in the list and not in the map.
    assert seen <= set(decoded['objects']['instance'].tolist())
    dropped += len(source[i]['objects']['instance']) - len(decoded['objects']['instance'])
  assert dropped > 5


def test_every_class_is_the_background_equally_often(source):
  backgrounds = []
  for i in range(len(source)):
    example = source[i]
    behind = decoded(example['segmentation'])[decoded(example['instances']) == 0]
    backgrounds.append(int(np.unique(behind[behind != 255])[0]))
  assert np.bincount(backgrounds, minlength=16).tolist() == [len(source) // 16] * 16
  assert source.class_names == tuple(photo_tiles.PHOTOS)
  assert len(np.unique(source.palette, axis=0)) == source.num_classes


def test_the_splits_are_made_from_separate_parts(monkeypatch):
  """Train scenes of photographs without train parts cannot be drawn, and so for test scenes."""
  split_photo = photo_tiles.split_photo
  for lacking, other in (('train', 'test'), ('test', 'train')):

    def only(photo, lacking=lacking):
      return {**split_photo(photo), lacking: []}

    monkeypatch.setattr(photo_scenes, 'split_photo', only)
    contents = photo_scenes.PhotoScenes()._contents()
    assert contents[other].examples[3]['image']
    with pytest.raises(ValueError, match='high'):
      contents[lacking].examples[3]
