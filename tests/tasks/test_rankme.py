"""RankMe: the effective rank of features."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.tasks import rankme


def _with_values(values) -> np.ndarray:
  """(50, 20) with these singular values, and 0 otherwise."""
  rng = np.random.default_rng(0)
  left, right = (np.linalg.qr(rng.standard_normal((n, 20)))[0] for n in (50, 20))
  return left[:, : len(values)] * values @ right[: len(values)]


def test_equal_singular_values_count_each_and_scale_does_not():
  for rank in (1, 7, 20):
    assert rankme.effective_rank(_with_values([3.0] * rank)) == pytest.approx(rank, rel=1e-4)
  assert rankme.effective_rank(1000 * _with_values([3.0] * 7)) == pytest.approx(7, rel=1e-4)


def test_unequal_ones_count_by_their_entropy():
  values = np.array([8.0, 4.0, 2.0, 2.0])  # shares 1/2, 1/4, 1/8, 1/8: 1.75 bits
  assert rankme.effective_rank(_with_values(values)) == pytest.approx(2**1.75, rel=1e-4)


def test_features_that_are_all_zero_have_no_rank():
  assert rankme.effective_rank(np.zeros((4, 3))) == pytest.approx(1, abs=1e-4)


def test_every_set_is_measured_without_broken_images_as_often_as_asked(monkeypatch):
  features = _with_values([1.0] * 5).astype(np.float32)
  found = []

  class Collected:
    def __init__(self, context, source, predict, finish, *, name):
      found.append((source, name))
      self.value = lambda: finish(predict(None, {'image': jnp.array(features)}), np.arange(50))

    def __call__(self, step, state):
      return self.value()

  monkeypatch.setattr(rankme, 'Collected', Collected)
  context = types.SimpleNamespace(
    every=lambda section: {'rankme': 10}[section],
    setting=lambda key: {'rankme.size': 50}[key],
    sets={'eval': 'a', 'eval_b': 'b'},
    some=lambda source, size: (source, size),
  )
  evaluators = rankme.evaluators(context, lambda model, images: images)
  assert found == [(('a', 50), 'eval'), (('b', 50), 'eval_b')]
  assert [e.every for e in evaluators] == [10, 10]
  assert evaluators[0].run(0, {})['rankme'] == pytest.approx(5, rel=1e-3)
  context.every = lambda section: None
  assert rankme.evaluators(context, None) == []
