"""The activation of the MLPs: one form, because differentiated by hand it is slower on GPUs."""

import jax

from hivit_jax.ops.precision import widen


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x), Phi the distribution function of the standard normal: the exact GELU.

  Computed in at least float32, returned in the type of `x`.
  """
  # With erf: the erfc of `jax.nn.gelu` is precise where x * Phi(x) vanishes, but slower.
  wide = widen(x)
  return (0.5 * wide * (1.0 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)
