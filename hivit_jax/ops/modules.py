"""Linear layers and LayerNorm as Flax modules that compute with the chosen `Ops`; BatchNorm."""

from typing import Any

import jax
from flax import nnx

from hivit_jax.ops import initializers
from hivit_jax.ops.choice import FAST, Ops

LAYER_NORM_EPS = 1e-6
BATCH_NORM_EPS = 1e-6


class Linear(nnx.Linear):
  """`nnx.Linear` computed as one product of two matrices, whatever the leading axes.

  With three and more axes XLA's CPU backend copies activations for the weight's gradient.
  """

  ops: Ops = FAST

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """(..., in_features) -> (..., out_features)."""
    x = inputs.reshape(-1, inputs.shape[-1]).astype(self.dtype)
    out = self.ops.linear(x, self.kernel[...], None if self.bias is None else self.bias[...])
    return out.reshape(*inputs.shape[:-1], out.shape[-1])


def linear(
  in_features: int,
  out_features: int,
  *,
  rngs: nnx.Rngs,
  dtype: Any,
  use_bias: bool = True,
  std: float = 0.02,
) -> Linear:
  """Linear layer with the initialisation of the reference.

  The reference draws from a normal of standard deviation `std` cut at +-2 (absolute, 100 standard
  deviations), which is a plain normal; biases start at zero.
  """
  return Linear(
    in_features,
    out_features,
    use_bias=use_bias,
    kernel_init=initializers.normal(std),
    bias_init=initializers.constant(0.0),
    dtype=dtype,
    rngs=rngs,
  )


class PatchConv(nnx.Conv):
  """A convolution whose stride is its size: a product with its reshaped kernel."""

  ops: Ops = FAST

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Pixels in (row, column, channel) order: (..., size of a patch) -> (..., features)."""
    params: Any = self
    kernel = params.kernel[...]
    x = inputs.reshape(-1, inputs.shape[-1]).astype(self.dtype)
    x = self.ops.linear(x, kernel.reshape(-1, kernel.shape[-1]), params.bias[...])
    return x.reshape(*inputs.shape[:-1], -1)


class LayerNorm(nnx.LayerNorm):
  """LayerNorm over the last axis; statistics in at least float32."""

  ops: Ops = FAST

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """(..., features) -> the same shape."""
    if mask is not None:
      raise NotImplementedError('nnx.LayerNorm takes a mask, this one does not')
    rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    params: Any = self
    out = self.ops.layer_norm(rows, params.scale[...], params.bias[...], self.epsilon)
    return out.reshape(x.shape)


def layer_norm(
  features: int, *, rngs: nnx.Rngs, dtype: Any, epsilon: float = LAYER_NORM_EPS
) -> LayerNorm:
  """LayerNorm with the epsilon of the reference."""
  return LayerNorm(
    features,
    epsilon=epsilon,
    scale_init=initializers.constant(1.0),
    bias_init=initializers.constant(0.0),
    dtype=dtype,
    rngs=rngs,
  )


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
