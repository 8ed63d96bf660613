"""LayerNorm, whose gradient is written by hand, against what JAX derives."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.ops.norm import LayerNorm, layer_norm
from tests.ops.derivatives import assert_rounded, draw, gradients


@pytest.mark.parametrize('offset', [0.0, 300.0])
def test_layer_norm_is_flax_layer_norm_with_its_gradient(offset):
  x, scale, bias = draw(0, 2, 5, 24) + offset, 1 + draw(1, 24), draw(2, 24)

  def apply(cls, x, scale, bias):
    norm = cls(24, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = scale, bias
    return norm(x)

  ours, theirs = (lambda *args, cls=cls: apply(cls, *args) for cls in (LayerNorm, nnx.LayerNorm))
  tolerance = {'rtol': 2e-5, 'atol': 2e-5}
  np.testing.assert_allclose(ours(x, scale, bias), theirs(x, scale, bias), **tolerance)
  for a, b in zip(gradients(ours, x, scale, bias), gradients(theirs, x, scale, bias), strict=True):
    np.testing.assert_allclose(a, b, **tolerance)


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
  dtypes = (jnp.bfloat16, jnp.float32)
  assert_rounded({d: layer_norm(24, rngs=nnx.Rngs(0), dtype=d) for d in dtypes})


def test_layer_norm_in_bfloat16_keeps_statistics_in_float32():
  # Exact in bfloat16, which its sums are not.
  x = (256 + 2 * jnp.arange(32.0))[None].astype(jnp.bfloat16)
  norm = layer_norm(32, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  exact = layer_norm(32, rngs=nnx.Rngs(0), dtype=jnp.float32)(x.astype(jnp.float32))
  assert norm(x).dtype == jnp.bfloat16
  np.testing.assert_allclose(norm(x).astype(jnp.float32), exact, atol=2**-7)
