"""What `predict` writes for a detector."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from hivit_jax.data import class_lists, coco
from hivit_jax.tasks import detection_pictures
from hivit_jax.tools import predict_objects
from tests.helpers import random_model
from tests.models.test_mask_rcnn import DETECTOR

STATISTICS = {'mean': (0.5,) * 3, 'std': (0.25,) * 3}
NAMES = ('cat', 'dog', 'fox', 'hen', 'owl')
METADATA = {'config': {'detect': {'long_side': 120, 'eval_short_side': 60, 'anchors': 8}}}
SIZES = {'wide': (70, 40), 'tall': (20, 90)}


@pytest.fixture(scope='module')
def model():
  return nnx.merge(*random_model('detect_hivit_tiny', **DETECTOR))


def test_objects_are_printed_and_drawn_in_the_pixels_of_the_image(model, tmp_path, capsys):
  rng = np.random.default_rng(0)
  for name, (width, height) in SIZES.items():
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(
      tmp_path / f'{name}.png'
    )
  (tmp_path / 'broken.png').write_bytes(b'nothing')
  paths = [str(tmp_path / f'{name}.png') for name in ('wide', 'broken', 'tall')]
  task = predict_objects.task_of(METADATA, model, **STATISTICS)
  assert (task.eval_short_side, task.long_side, task.num_classes) == (60, 120, 5)
  out = tmp_path / 'out'
  failed = predict_objects.predict(paths, model, task, NAMES, top=2, as_json=True, folder=str(out))
  assert failed == paths[1:2]
  printed = capsys.readouterr()
  assert f'cannot read the image {paths[1]}' in printed.err
  rows = {row['file']: row['objects'] for row in map(json.loads, printed.out.splitlines())}
  assert list(rows) == [paths[0], paths[2]]
  assert sum(map(len, rows.values())) > 0  # random weights find something
  for name, (width, height) in SIZES.items():
    found = rows[str(tmp_path / f'{name}.png')]
    assert [one['score'] for one in found] == sorted((o['score'] for o in found), reverse=True)
    for one in found:
      left, top, across, down = one['bbox']
      assert 0 <= left <= left + across <= width + 1e-2
      assert 0 <= top <= top + down <= height + 1e-2
      assert one['label'] == NAMES[one['index']]
      assert coco.decode(one['segmentation'], (height, width)).shape == (height, width)
    with Image.open(out / f'{name}_objects.png') as picture:
      assert picture.width / width == picture.height / height == -(-320 // min(width, height))


def test_masks_boxes_and_names_are_where_they_belong():
  mask = np.zeros((400, 500), np.uint8)
  mask[100:200, 50:250] = 1
  one = {
    'category_id': 1,
    'bbox': [50.0, 100.0, 200.0, 100.0],
    'score': 0.875,
    'segmentation': coco.encode(mask),
  }
  colours = class_lists.distinct_colours(6)[1:]
  image = np.full((400, 500, 3), 100, np.uint8)
  drawn = np.asarray(detection_pictures.draw(image, [one], NAMES, colours))
  assert drawn.shape == image.shape
  np.testing.assert_array_equal(drawn[150, 150], (100 + colours[1].astype(int)) // 2)
  np.testing.assert_array_equal(drawn[150, 50], colours[1])
  np.testing.assert_array_equal(drawn[300, 400], [100, 100, 100])
  assert (drawn[104:112, 54:120] != colours[1]).any()  # the text
  nothing = detection_pictures.draw(image, [], NAMES, colours)
  np.testing.assert_array_equal(np.asarray(nothing), image)


def test_classes_without_names_are_coco_s_if_there_are_as_many():
  assert predict_objects.known_names(80)[79] == 'toothbrush'
  assert predict_objects.known_names(3) == ['0', '1', '2']


def test_the_best_objects_are_lines_of_text():
  one = {'category_id': 4, 'bbox': [1.2, 2.6, 30.0, 9.9], 'score': 0.5}
  assert predict_objects._line(one, NAMES) == '   50.0 %  owl, 30x10 at (1, 3)'
