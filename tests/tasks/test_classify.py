"""The classification task: targets, loss, exact evaluation sums."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.images import normalize
from tests.helpers import TINY, random_model

STATISTICS = {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4)}
CLASSES = 7


class _Fixed:
  """A classifier whose logits are given; enough of a model for the task."""

  drop_path_rates = ()

  def __init__(self, logits):
    self.logits = jnp.asarray(logits, jnp.float32)

  def __call__(self, images, **_):
    assert images.dtype == jnp.float32
    return self.logits


def _batch(labels, mask=None) -> dict:
  labels = np.asarray(labels, np.int32)
  images = np.random.default_rng(0).integers(0, 256, (len(labels), 64, 64, 3), np.uint8)
  mask = np.ones(len(labels), bool) if mask is None else np.asarray(mask)
  return {'image': images, 'label': labels, 'mask': mask}


def test_targets_are_smoothed_and_images_normalised_before_they_are_augmented():
  task = ClassifyTask(**STATISTICS, num_classes=CLASSES, label_smoothing=0.1)
  batch = _batch([2, 5])
  prepared = task.prepare(_Fixed([]), batch, jax.random.key(0))
  assert set(prepared) == {'image', 'target', 'weight', 'count'}
  expected = np.full((2, CLASSES), 0.1 / CLASSES)
  expected[0, 2] += 0.9
  expected[1, 5] += 0.9
  np.testing.assert_allclose(prepared['target'], expected, rtol=1e-5)
  np.testing.assert_array_equal(prepared['image'], batch['image'])  # normalised with the loss
  erased = dataclasses.replace(task, erase=1e-9).prepare(_Fixed([]), batch, jax.random.key(0))
  np.testing.assert_allclose(erased['image'], normalize(batch['image'], *STATISTICS.values()))


def test_the_loss_is_the_mean_cross_entropy():
  logits = np.random.default_rng(1).standard_normal((3, CLASSES)).astype(np.float32)
  task = ClassifyTask(**STATISTICS, num_classes=CLASSES, label_smoothing=0.1)
  prepared = task.prepare(_Fixed(logits), _batch([0, 3, 6]), jax.random.key(0))
  loss, metrics = task.loss(_Fixed(logits), prepared)
  log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  np.testing.assert_allclose(loss, -(prepared['target'] * log).sum(axis=1).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['accuracy'], np.mean(logits.argmax(axis=1) == [0, 3, 6]))


@pytest.mark.slow
def test_everything_random_is_drawn_for_the_whole_batch():
  """So that a part of a batch is computed as within the whole."""
  task = ClassifyTask(
    **STATISTICS, num_classes=CLASSES, label_smoothing=0.1, erase=0.5, mixup=0.8, cutmix=1.0
  )
  graphdef, params = random_model('hivit_tiny', **TINY, num_classes=CLASSES, drop_path_rate=0.5)
  model = nnx.merge(graphdef, params)
  prepared = task.prepare(model, _batch(range(4)), jax.random.key(0))
  assert {key: value.shape[:1] for key, value in prepared.items()} == {
    'image': (4,), 'target': (4,), 'weight': (4,), 'drop_path_noise': (4,), 'count': (),
  }  # fmt: skip
  whole, _ = task.loss(model, prepared)
  parts = [
    task.loss(model, {k: v[i::2] if v.ndim else v for k, v in prepared.items()})[0]
    for i in range(2)
  ]
  np.testing.assert_allclose(whole, np.sum(parts), rtol=1e-5)


def test_examples_without_a_label_are_ignored():
  """The loss of the others is what it is without them, and nothing is left of a whole batch."""
  logits = np.random.default_rng(1).standard_normal((4, CLASSES)).astype(np.float32)
  task = ClassifyTask(**STATISTICS, num_classes=CLASSES, label_smoothing=0.1)

  def loss_of(rows, labels):
    prepared = task.prepare(_Fixed([]), _batch(labels), jax.random.key(0))
    return task.loss(_Fixed(logits[rows]), prepared)

  loss, metrics = loss_of([0, 1, 2, 3], [2, -1, 5, -1])
  expected, accuracy = loss_of([0, 2], [2, 5])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics['accuracy'], accuracy['accuracy'])
  assert float(loss_of([0, 1, 2, 3], [-1] * 4)[0]) == 0


def test_an_image_mixed_with_one_without_a_label_counts_for_its_own_share():
  task = ClassifyTask(**STATISTICS, num_classes=CLASSES, mixup=0.8)
  prepared = task.prepare(_Fixed([]), _batch([2, -1]), jax.random.key(0))
  share = float(prepared['target'][0, 2])
  assert 0 < share < 1
  np.testing.assert_allclose(prepared['weight'], [share, 1 - share], rtol=1e-6)
  np.testing.assert_allclose(prepared['target'].sum(axis=1), prepared['weight'], rtol=1e-6)
  np.testing.assert_allclose(prepared['count'], 1, rtol=1e-6)


def test_evaluation_sums_leave_out_what_does_not_count():
  logits = np.zeros((6, CLASSES), np.float32)
  logits[0, 1] = logits[1, 2] = logits[2, 3] = 3.0  # right, wrong, right
  logits[1] += [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.1]  # the label, 4, is third
  logits[3] = [6, 5, 4, 3, 2, 1, 0]  # the label, 5, is sixth
  batch = _batch([1, 4, 3, 5, 0, -1], mask=[True, True, True, True, False, True])
  sums = ClassifyTask(**STATISTICS, num_classes=CLASSES).evaluate(_Fixed(logits), batch)
  log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  expected = -(log[0, 1] + log[1, 4] + log[2, 3] + log[3, 5])
  assert {key: float(sums[key]) for key in ('count', 'top1', 'top5')} == {
    'count': 4, 'top1': 2, 'top5': 3,
  }  # fmt: skip
  np.testing.assert_allclose(sums['loss'], expected, rtol=1e-5)


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf])
def test_a_model_that_says_the_same_of_all_is_not_right(value):
  sums = ClassifyTask(**STATISTICS, num_classes=CLASSES).evaluate(
    _Fixed(np.full((2, CLASSES), value)), _batch([0, 1])
  )
  assert (sums['count'], sums['top1'], sums['top5']) == (2, 0, 0)


def test_floats_are_normalised_as_they_are_and_integers_by_their_range():
  """As soon as the task gets them: nothing else tells floats that are normalised from others."""
  statistics = {'mean': (250.0,), 'std': (20.0,)}
  task = ClassifyTask(num_classes=3, dtype='float32', **statistics)
  floats = np.random.default_rng(0).normal(250, 20, (4, 8, 8, 1)).astype(np.float32)
  batch = {'image': jnp.array(floats), 'label': jnp.zeros(4, jnp.int32)}
  model = types.SimpleNamespace(drop_path_rates=())
  prepared = task.prepare(model, batch, jax.random.key(0))['image']
  np.testing.assert_allclose(prepared, (floats - 250) / 20, atol=1e-5)
  assert task.shapes((8, 8), 1)['image'].dtype == jnp.float32
  wide = np.array([[[[0, 65535]]]], np.uint16)
  half = normalize(jnp.array(wide), (0.5, 0.5), (0.5, 0.25))
  np.testing.assert_allclose(half, [[[[-1, 2]]]], rtol=1e-6)
