"""LayerNorm against Flax's, and its precision."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.ops.modules import LayerNorm, layer_norm


@pytest.mark.parametrize('offset', [0.0, 300.0])
def test_layer_norm_is_that_of_flax(offset):
  x, scale, bias = (np.random.default_rng(i).standard_normal(24, np.float32) for i in range(3))

  def apply(cls):
    norm = cls(24, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = scale, bias
    return norm(x[None, None] + offset)

  np.testing.assert_allclose(apply(LayerNorm), apply(nnx.LayerNorm), rtol=2e-5, atol=2e-5)


def test_layer_norm_in_bfloat16_keeps_statistics_in_float32():
  # Exact in bfloat16, which its sums are not.
  x = (256 + 2 * jnp.arange(32.0))[None].astype(jnp.bfloat16)
  norm = layer_norm(32, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  exact = layer_norm(32, rngs=nnx.Rngs(0), dtype=jnp.float32)(x.astype(jnp.float32))
  assert norm(x).dtype == jnp.bfloat16
  np.testing.assert_allclose(norm(x).astype(jnp.float32), exact, atol=2**-7)
