"""Layers whose gradients are written by hand, against those that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.models import layers


def _draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _gradients(function, *args):
  out = jax.eval_shape(function, *args)
  weights = _draw(9, *out.shape)
  return jax.grad(lambda *a: (function(*a) * weights).sum(), range(len(args)))(*args)


def test_gelu_has_the_derived_gradient():
  def plain(x):
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))

  x = jnp.linspace(-6, 6, 101)
  np.testing.assert_array_equal(layers.gelu(x), plain(x))
  np.testing.assert_allclose(_gradients(layers.gelu, x), _gradients(plain, x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('offset', [0.0, 300.0])
def test_layer_norm_is_flax_layer_norm_with_its_gradient(offset):
  x, scale, bias = _draw(0, 2, 5, 24) + offset, 1 + _draw(1, 24), _draw(2, 24)

  def apply(cls, x, scale, bias):
    norm = cls(24, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = scale, bias
    return norm(x)

  ours, theirs = (
    lambda *args, cls=cls: apply(cls, *args) for cls in (layers.LayerNorm, nnx.LayerNorm)
  )
  tolerance = {'rtol': 2e-5, 'atol': 2e-5}
  np.testing.assert_allclose(ours(x, scale, bias), theirs(x, scale, bias), **tolerance)
  for a, b in zip(
    _gradients(ours, x, scale, bias), _gradients(theirs, x, scale, bias), strict=True
  ):
    np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize('kind', ['gelu', 'layer_norm'])
def test_gradients_in_bfloat16_are_those_of_float32_rounded(kind):
  norm = {d: layers.layer_norm(24, rngs=nnx.Rngs(0), dtype=d) for d in (jnp.bfloat16, jnp.float32)}
  function = {d: layers.gelu if kind == 'gelu' else norm[d] for d in norm}
  x = 3 * _draw(0, 4, 24).astype(jnp.bfloat16)
  weights = _draw(1, 4, 24).astype(jnp.bfloat16)
  ours, exact = (
    jax.grad(lambda x, d=d: (function[d](x) * weights.astype(d)).astype(jnp.float32).sum())(
      x.astype(d)
    )
    for d in norm
  )
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-6, atol=2**-7)


def test_layer_norm_in_bfloat16_keeps_statistics_in_float32():
  # Exact in bfloat16, which its sums are not.
  x = (256 + 2 * jnp.arange(32.0))[None].astype(jnp.bfloat16)
  norm = layers.layer_norm(32, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  exact = layers.layer_norm(32, rngs=nnx.Rngs(0), dtype=jnp.float32)(x.astype(jnp.float32))
  assert norm(x).dtype == jnp.bfloat16
  np.testing.assert_allclose(norm(x).astype(jnp.float32), exact, atol=2**-7)


def test_what_tpus_do_with_queries_keys_and_values():
  """They take one array apart and join it by other steps, with the same result."""
  qkv = np.random.default_rng(0).standard_normal((2, 7, 5, 3, 4, 8), np.float32)
  parts = layers._split_columns(qkv)
  for part, expected in zip(parts, layers._split(qkv), strict=True):
    assert part.shape == (2, 7, 4, 5, 8)
    np.testing.assert_array_equal(part, expected)
  for join in (layers._join, layers._join_columns):
    np.testing.assert_array_equal(join(*parts), qkv)
