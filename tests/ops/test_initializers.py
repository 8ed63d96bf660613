"""Initial values: their distributions, and that shapes share a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from hivit_jax.ops import initializers

KEY = jax.random.key(3)


@pytest.mark.parametrize(
  ('draw', 'distribution'),
  [
    (initializers.normal(0.02), stats.norm(0, 0.02)),
    (initializers.uniform(0.3), stats.uniform(-0.3, 0.6)),
  ],
  ids=['normal', 'uniform'],
)
def test_distributions(draw, distribution):
  values = np.asarray(draw(KEY, (500, 200), np.float32))  # more than one piece
  assert (values.shape, values.dtype) == ((500, 200), np.float32)
  assert stats.kstest(values.ravel(), distribution.cdf).pvalue > 1e-3
  half = values.size // 2  # pieces are not repeated
  assert abs(np.corrcoef(values.ravel()[:half], values.ravel()[half:])[0, 1]) < 0.02
  assert np.unique(values).size > 0.98 * values.size
  assert not np.array_equal(values, draw(jax.random.key(4), (500, 200), np.float32))


def test_the_numbers_are_the_same_in_a_trace():
  draw = initializers.normal(0.02)
  outside, inside = draw(KEY, (300, 300)), jax.jit(lambda key: draw(key, (300, 300)))(KEY)
  np.testing.assert_allclose(outside, inside, rtol=1e-6, atol=1e-9)


def test_shapes_share_one_program_and_shapes_alone_compute_nothing():
  draw = initializers.normal(0.02)
  draw(KEY, (3,))
  programs = initializers._normal._cache_size()
  for shape in ((5, 7), (400, 400), ()):
    assert draw(KEY, shape).shape == shape
  assert initializers._normal._cache_size() == programs
  huge = (1 << 20, 1 << 20)  # 4 TB
  assert jax.eval_shape(lambda: draw(KEY, huge)).shape == huge


def test_constants_compile_nothing(caplog):
  with jax.log_compiles():
    values = initializers.constant(0.25)(KEY, (3, 1, 4, 1, 59))
    assert not caplog.text
    jnp.full((3, 1, 4, 1, 60), 0.25)
    assert 'Compiling' in caplog.text
  assert (values.shape, values.dtype) == ((3, 1, 4, 1, 59), np.float32)
  assert np.all(np.asarray(values) == 0.25)


def test_the_keys_are_those_of_flax():
  ours, flax = initializers.keys(3), nnx.Rngs(3)
  for _ in range(3):
    assert jnp.array_equal(jax.random.key_data(ours.params()), jax.random.key_data(flax.params()))
