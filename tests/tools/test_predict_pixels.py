"""What `predict` writes for a segmenter."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from hivit_jax.data import class_lists
from hivit_jax.errors import UserError
from hivit_jax.tasks import segmentation, segmentation_pictures
from hivit_jax.tools import loaded, predict_pixels
from tests.helpers import random_model

MODEL = {
  'image_size': 32, 'position_image_size': 32, 'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2,
  'num_classes': 3, 'head_channels': 8, 'auxiliary_channels': 4,
}  # fmt: skip
STATISTICS = {'mean': (0.5,) * 3, 'std': (0.25,) * 3}
NAMES = ('sky', 'sea', 'sand')


@pytest.fixture(scope='module')
def model():
  return nnx.merge(*random_model('segment_hivit_tiny', **MODEL))


@pytest.mark.parametrize(
  ('names', 'folder', 'said'),
  [
    (['a.png'], 'photos', 'the picture a.png would overwrite an image'),
    (['a.jpg', 'a_colour.png'], 'photos', 'the picture a_colour.png would overwrite an image'),
    (['a.jpg', 'a.png'], 'out', 'a.jpg and .*a.png would both be a.png'),
    (['legend.jpg'], 'out', 'the legend and .*legend.jpg would both be legend.png'),
  ],
)
def test_no_picture_replaces_another(tmp_path, names, folder, said):
  paths = [str(tmp_path / 'photos' / name) for name in names]
  with pytest.raises(UserError, match=f'^--save=.*{said}'):
    loaded.check_pictures(paths, tmp_path / folder, predict_pixels.pictures)
  loaded.check_pictures(paths[:1] * 2, tmp_path / 'out', lambda path: [f'{path}_objects.png'])


def test_pictures_shares_and_broken_images(model, tmp_path, capsys):
  sizes = {'wide': (70, 40), 'tiny': (9, 20)}
  rng = np.random.default_rng(0)
  for name, (width, height) in sizes.items():
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(
      tmp_path / f'{name}.png'
    )
  (tmp_path / 'broken.png').write_bytes(b'nothing')
  paths = [str(tmp_path / f'{name}.png') for name in ('wide', 'broken', 'tiny')]
  task = predict_pixels.task_of({}, model, **STATISTICS)
  assert (task.inference, task.stride) == ('slide', (21, 21))
  out = tmp_path / 'out'
  failed = predict_pixels.predict(paths, model, task, NAMES, top=2, as_json=True, folder=str(out))
  assert failed == paths[1:2]
  printed = capsys.readouterr()
  assert f'cannot read the image {paths[1]}' in printed.err
  rows = {row['file']: row['classes'] for row in map(json.loads, printed.out.splitlines())}
  assert list(rows) == [paths[0], paths[2]]
  palette = class_lists.distinct_colours(3)
  for name, size in sizes.items():
    with Image.open(out / f'{name}.png') as picture:
      assert (picture.size, picture.mode) == (size, 'P')
      labels = np.asarray(picture)
      colours = np.asarray(picture.convert('RGB'))
    np.testing.assert_array_equal(colours, palette[labels])
    np.testing.assert_array_equal(np.asarray(Image.open(out / f'{name}_colour.png')), colours)
    image = np.asarray(Image.open(tmp_path / f'{name}.png')).astype(int)
    overlay = np.asarray(Image.open(out / f'{name}_overlay.png'))
    np.testing.assert_array_equal(overlay, (image + colours) // 2)
    best = rows[str(tmp_path / f'{name}.png')][0]
    assert best['share'] == pytest.approx((labels == NAMES.index(best['label'])).mean())
  assert (out / 'legend.png').exists()


def test_more_than_256_classes_have_numbers_of_two_bytes(tmp_path):
  expected = np.array([[0, 255, 256], [299, 1, 2]])
  labels = np.asarray(segmentation._likeliest(np.eye(300, dtype=np.float32)[expected]))
  assert labels.dtype == np.uint16
  np.testing.assert_array_equal(labels, expected)
  image, palette = np.zeros((2, 3, 3), np.uint8), class_lists.distinct_colours(300)
  predict_pixels._write(str(tmp_path), 'a.jpg', image, labels, palette)
  with Image.open(tmp_path / 'a.png') as picture:
    assert picture.mode == 'I;16'
    np.testing.assert_array_equal(picture, expected)
  colours = np.asarray(Image.open(tmp_path / 'a_colour.png'))
  np.testing.assert_array_equal(colours, palette[expected])
  few = np.asarray(segmentation._likeliest(np.eye(256, dtype=np.float32)[[[255, 7]]]))
  assert few.dtype == np.uint8
  found = segmentation_pictures.colour(few, palette[:256])
  np.testing.assert_array_equal(found, palette[[[255, 7]]])


def test_a_run_brings_its_views_and_known_classes_their_colours(model):
  segment = {'inference': 'slide', 'stride': [16, 16], 'scales': [1.0, 1.5], 'mirrored': True}
  metadata = {'config': {'segment': segment | {'ratios': [0.5, 2.0]}}}
  task = predict_pixels.task_of(metadata, model, **STATISTICS)
  assert (task.stride, task.scales, task.mirrored) == ((16, 16), (1.0, 1.5), True)
  np.testing.assert_array_equal(
    predict_pixels.colours(class_lists.ADE20K.names), class_lists.ADE20K.palette
  )
