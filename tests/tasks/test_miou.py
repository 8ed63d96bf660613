"""mIoU and its companions against mmsegmentation's."""

import json

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data.segmentation_transforms import ClassMap
from hivit_jax.tasks import miou, pixels
from tests.helpers import GOLDEN

CASES = json.loads((GOLDEN / 'miou.json').read_text())['cases']


def _confusion(case) -> np.ndarray:
  """Over all images of a case, which may differ in size."""
  classes, ignored = case['num_classes'], case['ignore_index']
  classify = ClassMap(classes, ignored, case['reduce_zero_label'])
  total = np.zeros((classes, classes), np.int64)
  for found, stored in zip(case['predictions'], case['labels'], strict=True):
    labels = classify({'segmentation': Image.fromarray(np.array(stored, np.uint8))})
    labels = np.asarray(labels['segmentation'])
    total += pixels.confusion(np.array(found), labels, classes, ignore_index=ignored)
  return total


@pytest.mark.parametrize('case', CASES, ids=[case['note'][:30] for case in CASES])
def test_scores(case):
  confusion = _confusion(case)
  np.testing.assert_array_equal(np.diag(confusion), case['intersect'])
  np.testing.assert_array_equal(confusion.sum(axis=1), case['labelled'])
  np.testing.assert_array_equal(confusion.sum(axis=0), case['predicted'])
  scores, means = miou.scores(confusion), miou.means(confusion)
  for ours, theirs in (('iou', 'IoU'), ('accuracy', 'Acc')):
    expected = np.array([np.nan if x is None else x for x in case[theirs]])
    np.testing.assert_allclose(scores[ours], expected, rtol=1e-6)
  for ours, theirs in (('miou', 'mIoU'), ('macc', 'mAcc'), ('aacc', 'aAcc')):
    assert means[ours] == pytest.approx(case[theirs], rel=1e-6)


def test_tables_name_the_classes_and_leave_out_what_does_not_exist():
  confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
  rows = miou.rows(confusion, ('sky', 'sea', 'sand'))
  assert rows[0] == {'class': 'sky', 'iou': 0.75, 'accuracy': 0.75, 'share': 0.5}
  assert rows[2] == {'class': 'sand', 'iou': None, 'accuracy': None, 'share': 0.0}
  json.dumps(rows, allow_nan=False)
  lines = miou.table(confusion, ('sky', 'sea', 'sand')).splitlines()
  assert lines[1].split() == ['sea', '80.0', '100.0', '50.0']
  assert lines[3].split() == ['sand', '-', '-', '0.0']
  assert lines[-1] == 'mIoU 77.50, mAcc 87.50, aAcc 87.50'


def test_nothing_labelled():
  assert np.isnan(miou.means(np.zeros((2, 2), np.int64))['miou'])
