"""Detections in their images, and COCO's measures of them."""

import numpy as np
import pytest

pytest.importorskip('pycocotools')

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


def test_perfect_detections_have_an_ap_of_1():
  metrics = results.Measured(Source())(results.of_batch(found()), np.arange(2))
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
  measured = results.Measured(Source())
  metrics = measured(results.of_batch(found(shift=3.0)), np.arange(2))
  assert metrics['box_ap50'] == pytest.approx(1)
  assert 0 < metrics['box_ap'] < 1
  metrics = measured(results.of_batch(found(labels=(1, 0))), np.arange(2))
  assert metrics['box_ap'] == metrics['mask_ap'] == 0


def test_broken_examples_do_not_count():
  metrics = results.Measured(Source())(results.of_batch(found())[:1], np.array([1]))
  assert metrics['box_ap'] == pytest.approx(1)


def test_no_detections_at_all():
  none = found()
  none['valid'][:] = False
  metrics = results.Measured(Source())(results.of_batch(none), np.arange(2))
  assert metrics['box_ap'] == metrics['mask_ap'] == 0
