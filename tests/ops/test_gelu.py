"""GELU in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.ops.gelu import gelu


def test_bfloat16_is_float32_rounded():
  x = (3 * np.random.default_rng(0).standard_normal(96)).astype(jnp.bfloat16)
  exact = x.astype(np.float32)
  for function in (gelu, jax.grad(lambda x: gelu(x).astype(jnp.float32).sum())):
    out = function(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), function(exact), rtol=2**-8, atol=2**-9)
