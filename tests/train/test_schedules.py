"""The learning rate over a run."""

import json

import jax
import numpy as np
import pytest

from hivit_jax.train.schedules import warmup_cosine
from tests.helpers import GOLDEN

BASE = {'lr': 1.0, 'end_lr': 0.1, 'warmup_start_lr': 0.2, 'warmup_epochs': 2.0, 'epochs': 10.0}


@pytest.mark.parametrize('recipe', ['pretrain', 'finetune'])
def test_equals_the_official_schedule(recipe):
  golden = json.loads((GOLDEN / 'lr_schedule.json').read_text())[recipe]
  schedule = warmup_cosine(
    lr=golden['lr'],
    end_lr=golden['min_lr'],
    warmup_start_lr=0.0,
    warmup_epochs=golden['warmup_epochs'],
    epochs=golden['epochs'],
  )
  epochs, expected = np.array(golden['points']).T
  assert len(epochs) == 8
  # As in a step: in float32, the epoch an operand of the program.
  actual = jax.jit(jax.vmap(schedule))(epochs.astype(np.float32))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7 * golden['lr'])
  np.testing.assert_allclose([schedule(e) for e in epochs], actual, rtol=1e-6, atol=1e-10)


def test_warmup_is_linear_then_half_a_cosine():
  schedule = warmup_cosine(**BASE)
  actual = [schedule(e) for e in (0, 0.5, 1, 2, 4, 6, 8, 10)]
  cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * t)) / 2 for t in (0.25, 0.5, 0.75)]
  np.testing.assert_allclose(actual, [0.2, 0.4, 0.6, 1.0, *cosine, 0.1], rtol=1e-5)


def test_stays_at_the_end_rate():
  schedule = warmup_cosine(**BASE)
  np.testing.assert_allclose([schedule(10.0), schedule(10.5), schedule(50.0)], 0.1, rtol=1e-5)


def test_no_warmup():
  schedule = warmup_cosine(**BASE | {'warmup_epochs': 0.0})
  np.testing.assert_allclose([schedule(0.0), schedule(5.0), schedule(10.0)], [1.0, 0.55, 0.1])
