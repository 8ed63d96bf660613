"""Layer normalisation."""

import jax
import jax.numpy as jnp

from hivit_jax.ops.barriers import cuda_barrier
from hivit_jax.ops.precision import widen


def plain(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in the type of `x`.

  Args:
    x: (rows, features); statistics are at least float32.
    scale, bias: (features,).
    epsilon: added to the variance.
  """
  return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
  x32 = widen(x)
  mean = x32.mean(axis=-1, keepdims=True)
  # Not the fast variance E[x^2] - E[x]^2, which cancels badly for features with a large mean.
  rsqrt = jax.lax.rsqrt(jnp.square(x32 - mean).mean(axis=-1, keepdims=True) + epsilon)
  out = (x32 - mean) * rsqrt * scale + bias
  return out.astype(x.dtype), (x, mean, rsqrt, scale)


@jax.custom_vjp
def _layer_norm(x, scale, bias, epsilon):
  return plain(x, scale, bias, epsilon)


def _backward(residuals, g):
  x, mean, rsqrt, scale = residuals
  product, normal, g32 = _product_with_normal(x, mean, rsqrt, g)
  along = (product * scale).mean(axis=-1, keepdims=True)
  dx = rsqrt * (g32 * scale - (g32 * scale).mean(axis=-1, keepdims=True) - normal * along)
  # GPUs: without a barrier XLA writes the product to memory, in float32, for this sum.
  product, _, g32 = _product_with_normal(*cuda_barrier(x, mean, rsqrt, g))
  return dx.astype(x.dtype), product.sum(axis=0), g32.sum(axis=0), None


def _product_with_normal(x, mean, rsqrt, g):
  g = widen(g)
  normal = (widen(x) - mean) * rsqrt
  return g * normal, normal, g


_layer_norm.defvjp(_forward, _backward)


def fast(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """`plain`, differentiated by hand.

  For the backward pass it keeps its input and two numbers a row, and takes four sums instead of the
  seven that follow from its parts.
  """
  return _layer_norm(x, scale, bias, epsilon)
