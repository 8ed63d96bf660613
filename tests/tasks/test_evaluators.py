"""Sums and collected results over the batches of a set."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.tasks.evaluators import Collected, Summed

VALUES = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0], np.float32)
# The order of two processes' rows in batches of four: not that of the source.
ORDER = [[0, 4, 1, 5], [2, 6, 3, -1]]
BROKEN = 5


class _Model(nnx.Module):
  """Multiplies; its BatchNorm would take the mean away if it were in training."""

  def __init__(self, factor: float):
    self.factor = nnx.Param(jnp.float32(factor))
    self.norm = nnx.BatchNorm(1, use_bias=False, use_scale=False, epsilon=0.0, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.factor[...] * self.norm(x[:, None])[:, 0]


def _context():
  @contextlib.contextmanager
  def batches(source, transform=None):
    yield (
      {
        'x': jnp.asarray([source[i] if i >= 0 else 1e9 for i in rows], jnp.float32),
        'index': jnp.asarray(rows),
        'mask': jnp.asarray([i not in (-1, BROKEN) for i in rows]),
      }
      for rows in ORDER
    )

  return types.SimpleNamespace(
    graphdef=nnx.split(_Model(1.0))[0],
    batches=batches,
    whole=lambda params: params,
    fetch=np.asarray,
    jit=jax.jit,
  )


def _state(**factors: float) -> dict:
  return {key: nnx.to_pure_dict(nnx.state(_Model(factor))) for key, factor in factors.items()}


def _update(model, batch):
  own = model(batch['x'])
  return {'sum': jnp.where(batch['mask'], own, 0).sum(), 'count': batch['mask'].sum()}


def _mean(sums):
  assert all(value.dtype == np.float64 for value in sums.values())
  return {'mean': sums['sum'] / sums['count']}


COUNTED = np.delete(VALUES, BROKEN)


def test_sums_count_each_example_once_for_the_parameters_and_their_average():
  evaluate = Summed(_context(), VALUES, _update, _mean, name='eval_far')
  found = evaluate(3, _state(params=2.0))
  np.testing.assert_allclose(found.pop('eval_far/mean'), 2 * COUNTED.mean(), rtol=1e-6)
  assert found == {}
  found = evaluate(3, _state(params=2.0, ema=5.0))
  np.testing.assert_allclose(found['eval_far/ema_mean'], 5 * COUNTED.mean(), rtol=1e-6)
  np.testing.assert_allclose(found['eval_far/mean'], 2 * COUNTED.mean(), rtol=1e-6)


def test_results_are_collected_in_the_order_of_the_source_without_padding():
  seen = []

  def finish(results, index):
    seen.append((results, index))
    return {'last': results['own'][-1]}

  predict = lambda model, batch: {'own': model(batch['x']), 'x': batch['x']}  # noqa: E731
  evaluate = Collected(_context(), VALUES, predict, finish)
  found = evaluate(0, _state(params=2.0, ema=5.0))
  assert found == {'eval/last': 2 * VALUES[-1], 'eval/ema_last': 5 * VALUES[-1]}
  for (results, index), factor in zip(seen, (2, 5), strict=True):
    np.testing.assert_array_equal(index, [0, 1, 2, 3, 4, 6])
    np.testing.assert_array_equal(results['x'], COUNTED)
    np.testing.assert_allclose(results['own'], factor * COUNTED, rtol=1e-6)
