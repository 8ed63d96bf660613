"""COCO's measures and masks against pycocotools' own numbers."""

import json

import numpy as np
import pytest

from hivit_jax.data import coco
from tests.helpers import GOLDEN, load_golden

SETS = json.loads((GOLDEN / 'coco_eval.json').read_text())['sets']


@pytest.mark.parametrize('kind', coco.KINDS)
@pytest.mark.parametrize('name', SETS)
def test_the_twelve_numbers_and_those_of_the_categories_are_the_official_ones(name, kind):
  """Of the ten IoUs two are among the twelve numbers, and so is the mean over all."""
  case, theirs = SETS[name], coco.KINDS[kind]
  metrics, of_category = coco.evaluate(case['groundtruth'], case['predictions'][theirs], kind)
  expected = case['results'][theirs]
  assert list(metrics) == list(coco.METRICS)
  np.testing.assert_allclose(list(metrics.values()), expected['stats'], atol=1e-9)
  assert of_category == pytest.approx({int(k): v for k, v in expected['per_category'].items()})
  of_iou = expected['per_iou']
  assert len(of_iou) == 10
  wanted = [of_iou['0.50'], of_iou['0.75'], np.mean(list(of_iou.values()))]
  assert [metrics[key] for key in ('ap50', 'ap75', 'ap')] == pytest.approx(wanted)


@pytest.mark.parametrize('kind', coco.KINDS)
def test_no_detections_count_as_one_that_fits_nothing(kind):
  truth = SETS['crowd']['groundtruth']
  image = truth['images'][0]
  one = {'image_id': image['id'], 'category_id': truth['categories'][0]['id'], 'score': 0.1}
  if kind == 'box':
    one['bbox'] = [-50.0, -50.0, 1.0, 1.0]
  else:
    one['segmentation'] = coco.encode(np.zeros((image['height'], image['width']), np.uint8))
  assert coco.evaluate(truth, [], kind) == coco.evaluate(truth, [one], kind)


def test_polygons_and_run_lengths_become_the_official_masks():
  config, arrays = load_golden('mask_targets.npz')
  size = config['height'], config['width']
  expected = np.unpackbits(arrays['bitmaps'], axis=1)[:, : size[0] * size[1]].reshape(-1, *size)
  for polygons, mask in zip(config['segmentations'], expected, strict=True):
    found = coco.decode(polygons, size)
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(
      coco.decode(json.loads(json.dumps(coco.encode(mask))), size), mask
    )
  crowd = np.unpackbits(arrays['crowd'])[: size[0] * size[1]].reshape(size)
  np.testing.assert_array_equal(coco.decode(config['crowd'], size), crowd)
