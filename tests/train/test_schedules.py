"""The learning rate over a run; `tests/test_recipes.py` has that of each published recipe."""

import numpy as np
import pytest

from hivit_jax.train.schedules import Schedule

BASE = {'lr': 1.0, 'end_lr': 0.1, 'warmup_start_lr': 0.2, 'warmup_epochs': 2.0, 'epochs': 10.0}


def test_warmup_is_linear_then_half_a_cosine():
  schedule = Schedule(**BASE)
  actual = [schedule(e) for e in (0, 0.5, 1, 2, 4, 6, 8, 10)]
  cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * t)) / 2 for t in (0.25, 0.5, 0.75)]
  np.testing.assert_allclose(actual, [0.2, 0.4, 0.6, 1.0, *cosine, 0.1], rtol=1e-12)


def test_without_the_prefix_the_warmup_hides_the_cosines_beginning():
  schedule = Schedule(**BASE, warmup_prefix=False)
  warmup, cosine = Schedule(**BASE), Schedule(**BASE | {'warmup_epochs': 0.0})
  assert schedule(2.0) == cosine(2.0) < warmup(2.0) == 1.0
  before = np.nextafter(2.0, 0.0)  # the rate drops between two neighbouring numbers
  np.testing.assert_allclose(schedule(before), 1.0, rtol=1e-12)
  for epoch in (0.0, 1.0, before):
    assert schedule(epoch) == warmup(epoch)
  for epoch in (2.0, 2.5, 9.0, 10.0, 11.0):
    assert schedule(epoch) == cosine(epoch)


def test_steps():
  schedule = Schedule(**BASE, name='multistep', milestones=(4.0, 7.0), milestone_factor=0.5)
  epochs = [0.0, 1.0, 2.0, np.nextafter(4.0, 0.0), 4.0, 6.9, 7.0, 10.0, 20.0]
  expected = [0.2, 0.6, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]
  np.testing.assert_allclose([schedule(e) for e in epochs], expected, rtol=1e-12)
  np.testing.assert_allclose(schedule(np.array(epochs)), expected, rtol=1e-12)


@pytest.mark.parametrize('shape', [{}, {'warmup_prefix': False}, {'name': 'multistep'}])
def test_the_factor_of_a_layer(shape):
  whole = Schedule(**BASE, **shape)
  peak = Schedule(**BASE, **shape, scaled='peak')
  other = Schedule(**BASE | {'lr': 0.25}, **shape)
  for epoch in (0.0, 1.0, 2.0, 5.0, 10.0):
    np.testing.assert_allclose(whole(epoch, 0.25), 0.25 * whole(epoch), rtol=1e-12)
    np.testing.assert_allclose(peak(epoch, 0.25), other(epoch), rtol=1e-12)
    assert peak(epoch) == whole(epoch)
    for schedule in (whole, peak):  # what a step relies on
      lowest, highest = schedule(epoch, 0.0), schedule(epoch, 1.0)
      line = lowest + 0.25 * (highest - lowest)
      np.testing.assert_allclose(schedule(epoch, 0.25), line, rtol=1e-12)


def test_stays_at_the_end_rate():
  schedule = Schedule(**BASE)
  np.testing.assert_allclose([schedule(10.0), schedule(10.5), schedule(50.0)], 0.1, rtol=1e-12)


def test_no_warmup():
  schedule = Schedule(**BASE | {'warmup_epochs': 0.0})
  np.testing.assert_allclose([schedule(0.0), schedule(5.0), schedule(10.0)], [1.0, 0.55, 0.1])
