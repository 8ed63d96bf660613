"""The activation of the MLPs."""

import math

import jax
import jax.numpy as jnp

from hivit_jax.ops.precision import widen


def plain(x: jax.Array) -> jax.Array:
  """x Phi(x), Phi the distribution function of the standard normal: the exact GELU."""
  # With erf: the erfc of `jax.nn.gelu` is precise where x * Phi(x) vanishes, but twice as slow.
  return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


@jax.custom_vjp
def _gelu(x):
  return plain(x)


def _forward(x):
  return plain(x), x


def _backward(x, g):
  x32 = widen(x)
  cdf = 0.5 * (1.0 + jax.lax.erf(x32 * 2**-0.5))
  density = jnp.exp(-0.5 * jnp.square(x32)) * (2 * math.pi) ** -0.5
  return ((widen(g) * (cdf + x32 * density)).astype(x.dtype),)


_gelu.defvjp(_forward, _backward)


def fast(x: jax.Array) -> jax.Array:
  """`plain`, which for the backward pass keeps its input and nothing else."""
  return _gelu(x)
