"""Segmentation's transforms against mmsegmentation's numbers, and their own promises."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data import segmentation_transforms as seg
from hivit_jax.data.decode import BrokenImage
from hivit_jax.data.loader import train_loader
from hivit_jax.errors import UserError
from hivit_jax.tasks.views import Views
from tests import helpers

RATIOS = ('0.5', '0.73', '1.0', '1.37', '2.0')


@pytest.fixture(scope='module')
def golden():
  with np.load(helpers.GOLDEN / 'segmentation_transforms.npz') as file:
    arrays = dict(file)
  return json.loads(str(arrays.pop('config'))), arrays


def png(pixels) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(pixels)).save(buffer, 'PNG')
  return buffer.getvalue()


def example(pixels, labels) -> dict:
  return {'image': png(pixels), 'segmentation': png(labels)}


def labelled(labels) -> dict:
  labels = np.asarray(labels, np.uint8)
  return {
    'image': Image.fromarray(np.stack([labels] * 3, -1)),
    'segmentation': Image.fromarray(labels),
  }


def test_stored_labels_become_classes(golden):
  _, arrays = golden
  found = seg.ClassMap(150, reduce_zero_label=True)(
    {'segmentation': Image.fromarray(arrays['annotation'])}
  )
  np.testing.assert_array_equal(np.asarray(found['segmentation']), arrays['label'])


def test_sizes_are_those_of_mmsegmentation(golden):
  config, _ = golden
  crop = seg.RandomScaledCrop((640, 640), (2560, 640))
  for height, width, ratio, *expected in config['sizes_2560_640']:
    assert list(crop.resized(height, width, ratio)) == expected
  for height, width, ratio, *expected in config['setr_sizes_2560_640']:
    (view,) = Views((640, 640), 'slide', scales=(ratio,)).of((height, width))
    assert list(view.size) == expected


@pytest.mark.parametrize('ratio', RATIOS)
def test_resizing(golden, ratio):
  """Labels are equal; images within what PIL differs by from OpenCV: antialiasing when reduced."""
  config, arrays = golden
  crop = seg.RandomScaledCrop((1000, 1000), tuple(config['resize_scale']))
  given = {
    'image': Image.fromarray(arrays['image_rgb']),
    'segmentation': Image.fromarray(arrays['label']),
  }
  height, width = arrays['label'].shape
  size = crop.resized(height, width, float(ratio))
  found = crop.cut(given, size, (0, 0))
  np.testing.assert_array_equal(np.asarray(found['segmentation']), arrays[f'resize/{ratio}/label'])
  expected = arrays[f'resize/{ratio}/image_rgb'].astype(int)
  difference = np.abs(np.asarray(found['image']).astype(int) - expected)
  if expected.shape[0] >= arrays['image_rgb'].shape[0]:
    assert difference.max() <= 1
  else:
    assert difference.mean() < 6


@pytest.mark.parametrize('case', range(5))
def test_windows_are_drawn_again_as_by_mmsegmentation(golden, case):
  config, arrays = golden
  expected = config['crops'][case]
  labels, draws = arrays['crop/label'], iter(expected['offsets'])
  crop = seg.RandomScaledCrop(tuple(config['crop_size']), (1, 1), max_share=0.75)
  place = crop.window(labels, labels.shape, lambda rows, columns: tuple(next(draws)))
  assert list(place) == expected['taken']
  assert len(expected['offsets']) - len(list(draws)) == expected['used']


def test_mirror_and_padding(golden):
  _, arrays = golden
  config = golden[0]
  height, width = config['flip_region']
  transform = seg.train_transform(
    config['pad'], 150, scale=(10_000, height), ratios=(1, 1), max_share=1
  )
  top = arrays['image_rgb'][:height, :width]
  given = example(top, arrays['label'][:height, :width])

  class Mirrored(np.random.Generator):
    def random(self, *_, **__):
      return 0.0

  found = transform(given, Mirrored(np.random.PCG64(0)))
  assert found['extent'].tolist() == [height, width]
  np.testing.assert_array_equal(found['label_map'], arrays['flip_normalise_pad/label'])
  image = (found['image'] - np.array(config['mean'])) / np.array(config['std'])
  image[height:], image[:, width:] = 0, 0
  np.testing.assert_allclose(image, arrays['flip_normalise_pad/image'], atol=1e-6)


def test_image_and_labels_move_together():
  """Each pixel's colour says its class, and does so still after everything that is random."""
  rng = np.random.default_rng(0)
  labels = np.kron(rng.integers(0, 5, (4, 6)), np.ones((20, 20))).astype(np.uint8)
  colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3], np.uint8)
  given = example(colours[labels], labels)
  transform = seg.train_transform((48, 64), 5, scale=(90, 60))
  flat, sizes = 0, set()
  for seed in range(30):
    found = transform(given, np.random.default_rng(seed))
    assert found['image'].shape == (48, 64, 3)
    assert found['label_map'].shape == (48, 64)
    assert found['label_map'].dtype == np.uint8
    height, width = found['extent']
    sizes.add((height, width))
    assert (found['label_map'][height:] == 255).all()
    assert (found['label_map'][:, width:] == 255).all()
    inside = np.s_[:height, :width]
    image, classes = found['image'][inside], found['label_map'][inside]
    plain = (image % 255 == 0).all(-1)  # not mixed of two classes
    flat += plain.mean() / 30
    # All but those whose own class has a weight that is rounded to nothing.
    assert (image[plain] == colours[classes[plain]]).mean() > 0.999
  assert flat > 0.75
  assert len(sizes) > 3  # reduced ones are padded


def test_a_window_is_not_of_one_class_where_that_can_be_helped():
  labels = np.zeros((40, 40), np.uint8)
  labels[:, 36:] = 1
  crop = seg.RandomScaledCrop((20, 20), (40, 40), ratios=(1, 1), max_share=1.0)
  checked = seg.RandomScaledCrop((20, 20), (40, 40), ratios=(1, 1), max_share=0.9)

  def mixed(crop) -> float:
    found = [crop(labelled(labels), np.random.default_rng(i)) for i in range(60)]
    return np.mean([len(np.unique(np.asarray(f['segmentation']))) > 1 for f in found]).item()

  assert mixed(crop) < 0.5
  assert mixed(checked) > 0.7


@pytest.mark.parametrize(
  ('options', 'stored', 'message'),
  [
    ({}, 3, 'has class 3; the 3 classes are 0 to 2, and 255 is ignored'),
    ({'reduce_zero_label': True}, 4, 'has class 4; the 3 classes are 1 to 3, and 255 is ignored'),
    ({'ignore_index': 3}, 255, 'has class 255; the 3 classes are 0 to 2, and 3 is ignored'),
  ],
)
def test_labels_out_of_range_are_named(options, stored, message):
  classes = seg.ClassMap(3, **options)
  with pytest.raises(BrokenImage, match=message):
    classes(labelled([[1, stored]]))


def test_more_than_255_classes():
  stored = np.arange(1, 302, dtype=np.uint16).reshape(7, 43)
  with pytest.raises(UserError, match=r'ignore_index=255: .* no class, so at least 301'):
    seg.ClassMap(301)
  found = seg.ClassMap(301, ignore_index=65535, reduce_zero_label=True)(
    {'segmentation': Image.fromarray(stored)}
  )
  np.testing.assert_array_equal(np.asarray(found['segmentation']), stored - 1)


def test_a_small_ignore_index_and_16_bits():
  """The same classes in every kind of file."""
  stored = np.array([[0, 1, 2, 3, 2]], np.uint8)
  for labels in (stored, stored.astype(np.uint16)):
    for ignore_index, dtype in ((3, np.uint8), (300, np.uint16)):
      classes = seg.ClassMap(3, ignore_index=ignore_index, reduce_zero_label=True)
      found = np.asarray(classes({'segmentation': Image.fromarray(labels)})['segmentation'])
      last = 3 if ignore_index == 3 else 2  # what is ignored is so in the file, too
      assert found.tolist() == [[ignore_index, 0, 1, last, 1]]
      assert found.dtype == dtype


def test_nonsense_is_explained():
  with pytest.raises(UserError, match='expected 0 < smallest <= largest'):
    seg.train_transform(32, 3, scale=(64, 32), ratios=(2.0, 0.5))
  with pytest.raises(UserError, match='max_share=0: expected more than 0'):
    seg.train_transform(32, 3, scale=(64, 32), max_share=0)
  with pytest.raises(UserError, match='the longer and the shorter side'):
    seg.train_transform(32, 3, scale=(0, 32))


class Few:
  """Three images of different sizes."""

  name, split, class_names, num_classes = 'few', 'all', ('a', 'b', 'c'), 3

  def __len__(self):
    return 3

  def __getitem__(self, index):
    labels = np.full((20 + index, 30), index, np.uint8)
    return example(np.stack([labels] * 3, -1), labels)

  def example_name(self, index):
    return str(index)


def test_training_through_the_loader_is_a_function_of_seed_and_step():
  transform = seg.train_transform(32, 3, scale=(40, 32))

  def steps(**options):
    with train_loader(Few(), transform, batch_size=4, seed=3, **options) as loader:
      return list(loader)

  whole, late = steps(num_steps=3), steps(start_step=2, num_steps=1)
  for key in ('image', 'label_map', 'extent'):
    np.testing.assert_array_equal(whole[2][key], late[0][key])


def test_further_channels_change_nothing_about_the_first_three():
  """Four channels as they are stored are cut as an RGB picture is, in training and evaluation."""
  rng = np.random.default_rng(0)
  array, labels = (
    rng.integers(0, 256, (50, 70, 4), np.uint8),
    rng.integers(0, 2, (50, 70), np.uint8),
  )
  given = [{'image': array[..., :c], 'segmentation': labels} for c in (3, 4)]
  options = {'scale': (80, 40), 'ratios': (0.8, 1.6)}
  rgb, four = (
    seg.train_transform(32, 2, channels=c, **options)(each, np.random.default_rng(5))
    for c, each in zip((3, 4), given, strict=True)
  )
  np.testing.assert_array_equal(four['image'][..., :3], rgb['image'])
  np.testing.assert_array_equal(four['label_map'], rgb['label_map'])
  rgb, four = (
    Views((32, 32), 'slide', (21, 21), flip=True, classes=seg.ClassMap(2), channels=c)(each)
    for c, each in zip((3, 4), given, strict=True)
  )
  assert rgb['windows'].shape[-1] == 3
  for key in ('windows', 'image'):
    np.testing.assert_array_equal(four[key][..., :3], rgb[key])


@pytest.mark.parametrize('dtype', ['uint16', 'float32'])
def test_other_depths_stay_what_they_are(dtype):
  array = (np.random.default_rng(0).random((50, 70, 2)) * 60_000).astype(dtype)
  given = {'image': array, 'segmentation': np.zeros((50, 70), np.uint8)}
  made = seg.train_transform(
    32, 2, channels=2, dtype=dtype, scale=(80, 40), ratios=(1.0, 1.0), max_share=1.0
  )(given, np.random.default_rng(0))
  assert made['image'].dtype == dtype
  assert made['image'].max() > 30_000
  views = Views((32, 32), 'whole', channels=2, dtype=dtype)(given)
  assert views['windows'].dtype == views['image'].dtype == dtype
  np.testing.assert_array_equal(views['image'], array)
