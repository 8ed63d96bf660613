"""Detections in their images, and COCO's measures of them."""

import json

import numpy as np
import pytest

from hivit_jax.data import coco
from hivit_jax.tasks import detection_results as results

SIZE = (60, 80)
BOXES = np.array([[10, 10, 30, 40], [40, 5, 70, 55]], np.float32)


class Source:
  """Two images of two filled boxes each."""

  class_names = ('round', 'square')

  def __len__(self):
    return 2

  def __getitem__(self, index):
    bitmaps = np.zeros((2, *SIZE), np.uint8)
    for bitmap, (x1, y1, x2, y2) in zip(bitmaps, BOXES.astype(int), strict=True):
      bitmap[y1:y2, x1:x2] = 1
    return {
      'image': np.zeros((*SIZE, 3), np.uint8),
      'objects': {
        'boxes': BOXES,
        'classes': np.array([0, 1]),
        'masks': [coco.encode(m) for m in bitmaps],
      },
    }


def found(shift=0.0, labels=(0, 1)):
  """What a model that sees the images at twice their size says."""
  slots = 3
  boxes = np.zeros((2, slots, 4), np.float32)
  boxes[:, :2] = 2 * (BOXES + shift)
  return {
    'boxes': boxes,
    'scores': np.tile(np.array([0.9, 0.8, 0.0], np.float32), (2, 1)),
    'labels': np.tile(np.array([*labels, 0], np.int32), (2, 1)),
    'valid': np.tile([True, True, False], (2, 1)),
    'masks': np.ones((2, slots, 28, 28), np.float32),
    'size': np.tile(2 * np.array(SIZE, np.int32), (2, 1)),
    'original': np.tile(np.array(SIZE, np.int32), (2, 1)),
  }


def measured(detections, index):
  metrics = results.Truth(Source()).measure(detections, index).metrics
  return {key: value for key, value in metrics.items() if value >= 0}


def test_perfect_detections_have_an_ap_of_1():
  metrics = measured(results.of_batch(found()), np.arange(2))
  assert metrics['box_ap'] == metrics['mask_ap'] == pytest.approx(1)
  assert metrics['mask_ap_medium'] == pytest.approx(1)
  assert 'mask_ap_large' not in metrics  # there are none


def test_a_detection_is_in_the_pixels_of_its_original_image():
  one = results.of_batch(found())[0][1]
  assert one['bbox'] == [40, 5, 30, 50]
  mask = coco.decode(one['segmentation'], SIZE)
  assert mask[5:55, 40:70].all()
  assert mask.sum() == 50 * 30


def test_a_shift_costs_the_high_thresholds_and_a_wrong_class_everything():
  metrics = measured(results.of_batch(found(shift=3.0)), np.arange(2))
  assert metrics['box_ap50'] == pytest.approx(1)
  assert 0 < metrics['box_ap'] < 1
  metrics = measured(results.of_batch(found(labels=(1, 0))), np.arange(2))
  assert metrics['box_ap'] == metrics['mask_ap'] == 0


def test_broken_examples_do_not_count():
  metrics = measured(results.of_batch(found())[:1], np.array([1]))
  assert metrics['box_ap'] == pytest.approx(1)


def test_no_detections_at_all():
  none = found()
  none['valid'][:] = False
  metrics = measured(results.of_batch(none), np.arange(2))
  assert metrics['box_ap'] == metrics['mask_ap'] == 0


class OwnIds(Source):
  """With the ids of a results file, and a size that spares decoding."""

  category_ids = (7, 90)

  def __getitem__(self, index):
    example = super().__getitem__(index)
    return {**example, 'image': b'is not decoded', 'size': np.array(SIZE), 'image_id': 500 + index}


def test_known_sizes_spare_decoding_and_change_nothing():
  index, detections = np.arange(2), results.of_batch(found(shift=2.0))
  one, two = (results.Truth(source).measure(detections, index) for source in (Source(), OwnIds()))
  assert one == two
  assert results.Truth(OwnIds()).of_example(1)[2] == 501


def test_tables_have_the_twelve_numbers_and_every_class():
  report = results.Truth(Source()).measure(results.of_batch(found(labels=(0, 0))), np.arange(2))
  rows = {row['class']: row for row in report.categories}
  assert rows['round']['box_ap'] == rows['round']['mask_ap'] == pytest.approx(1)
  assert rows['square']['box_ap'] == 0
  assert {row['objects'] for row in report.categories} == {2}
  lines = report.text.splitlines()
  assert [line[:12].strip() for line in lines[1:13]] == [m.replace('_', ' ') for m in coco.METRICS]
  assert lines[1].split() == ['ap', '50.00', '50.00']
  assert lines[6].split() == ['ap', 'large', '-', '-']
  assert lines[-2].split() == ['round', '100.00', '100.00', '2']


def test_a_results_file_is_what_the_server_takes():
  detections = results.of_batch(found())
  boxes, masks = (results.rows(detections, (501, 500), (7, 90), kind) for kind in coco.KINDS)
  assert [set(rows[0]) for rows in (boxes, masks)] == [
    {'image_id', 'category_id', 'score', own} for own in ('bbox', 'segmentation')
  ]
  assert [row['image_id'] for row in boxes] == [501, 501, 500, 500]
  assert [row['category_id'] for row in masks] == [7, 90, 7, 90]
  assert [row['score'] for row in boxes[:2]] == [0.9, 0.8]
  again = json.loads(json.dumps(masks))
  assert coco.decode(again[1]['segmentation'], SIZE)[5:55, 40:70].all()
