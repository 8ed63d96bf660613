"""Gathers whose gradients are gathers: the values and gradients of plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.ops.gather import gather_pairs, gather_shared, gather_units

IDS = np.array([[4, 0, 2], [1, 2, 3]])
ALL = np.array([[4, 0, 2, 1, 3], [0, 1, 3, 4, 2]])
SHAPES = {gather_units: (2, 5, 3, 2), gather_shared: (5, 3), gather_pairs: (2, 5, 5)}
PLAIN = {
  gather_units: lambda x, ids: x[jnp.arange(2)[:, None], ids],
  gather_shared: lambda x, ids: x[ids],
  gather_pairs: lambda x, ids: x[:, ids[:, :, None], ids[:, None, :]].swapaxes(0, 1),
}


@pytest.mark.parametrize('ids', [IDS, ALL], ids=['some', 'all'])
@pytest.mark.parametrize('function', SHAPES, ids=lambda function: function.__name__)
def test_equals_indexing(function, ids):
  x = np.random.default_rng(0).standard_normal(SHAPES[function], np.float32)

  def value_and_gradient(function):
    out, pullback = jax.vjp(lambda x: function(x, jnp.asarray(ids)), x)
    return out, pullback(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))[0]

  (value, gradient), (expected, expected_gradient) = map(
    value_and_gradient, (function, PLAIN[function])
  )
  np.testing.assert_array_equal(value, expected)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


def test_a_position_outside_gives_nan():
  assert np.isnan(gather_units(np.ones((1, 4, 2), np.float32), np.array([[1, 4]]))[0, 1]).all()
