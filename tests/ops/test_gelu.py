"""GELU, whose gradient is written by hand, against what JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.ops.gelu import gelu
from tests.ops.derivatives import assert_rounded, gradients


def test_gelu_has_the_derived_gradient():
  def plain(x):
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))

  x = jnp.linspace(-6, 6, 101)
  np.testing.assert_array_equal(gelu(x), plain(x))
  np.testing.assert_allclose(gradients(gelu, x), gradients(plain, x), rtol=1e-6, atol=1e-7)


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
  assert_rounded({jnp.bfloat16: gelu, jnp.float32: gelu})
