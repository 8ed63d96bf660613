"""LayerNorm, differentiated by hand, and BatchNorm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.ops.barriers import cuda_barrier
from hivit_jax.ops.precision import widen

LAYER_NORM_EPS = 1e-6
BATCH_NORM_EPS = 1e-6


@jax.custom_vjp
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  return _normalise_forward(x, scale, bias, epsilon)[0]


def _normalise_forward(x, scale, bias, epsilon):
  x32 = widen(x)
  mean = x32.mean(axis=-1, keepdims=True)
  # Not the fast variance E[x^2] - E[x]^2, which cancels badly for features with a large mean.
  rsqrt = jax.lax.rsqrt(jnp.square(x32 - mean).mean(axis=-1, keepdims=True) + epsilon)
  out = (x32 - mean) * rsqrt * scale + bias
  return out.astype(x.dtype), (x, mean, rsqrt, scale)


def _normalise_backward(residuals, g):
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


_normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nnx.LayerNorm):
  """LayerNorm over the last axis; statistics in at least float32.

  Differentiated by hand: for the backward pass it keeps its input and two numbers a row, and takes
  four sums instead of the seven that follow from its parts.
  """

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """(..., features) -> the same shape."""
    if mask is not None:
      raise NotImplementedError('nnx.LayerNorm takes a mask, this one does not')
    rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    params: Any = self
    out = _normalise(rows, params.scale[...], params.bias[...], self.epsilon)
    return out.reshape(x.shape)


def layer_norm(
  features: int, *, rngs: nnx.Rngs, dtype: Any, epsilon: float = LAYER_NORM_EPS
) -> LayerNorm:
  """LayerNorm with the epsilon of the reference."""
  return LayerNorm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)


def batch_norm(features: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
  """BatchNorm without scale and bias, in float32; running statistics move by a tenth a step."""
  return nnx.BatchNorm(
    features,
    momentum=0.9,
    epsilon=BATCH_NORM_EPS,
    use_bias=False,
    use_scale=False,
    use_fast_variance=False,
    rngs=rngs,
  )
