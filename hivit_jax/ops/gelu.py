"""GELU, differentiated by hand."""

import math

import jax
import jax.numpy as jnp

from hivit_jax.ops.precision import widen


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU. For the backward pass it keeps its input and nothing else."""
  # With erf: the erfc of `jax.nn.gelu` is precise where x * cdf(x) vanishes, but twice as slow.
  return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


def _gelu_backward(x, g):
  x32 = widen(x)
  cdf = 0.5 * (1.0 + jax.lax.erf(x32 * 2**-0.5))
  density = jnp.exp(-0.5 * jnp.square(x32)) * (2 * math.pi) ** -0.5
  return ((widen(g) * (cdf + x32 * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
