"""Linear layers as products of two matrices, with gradients of parameters summed in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.ops import initializers
from hivit_jax.ops.barriers import cpu_after, cpu_barrier
from hivit_jax.ops.precision import at_least_float32, widen


@jax.custom_vjp
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
  """(rows, in), (in, out), (out,) -> (rows, out), in the type of `x`.

  The gradients of kernel and bias are float32 sums also where `x` is bfloat16, and so is what
  devices add up: with eight significant bits the sum would get worse with every device.
  """
  out = x @ kernel.astype(x.dtype)
  return out if bias is None else out + bias.astype(x.dtype)


def _affine_forward(x, kernel, bias):
  return affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(residuals, g):
  x, kernel, bias = residuals
  dx = g @ kernel.astype(g.dtype).T
  # CPUs: a transpose and a plain product are faster than a product that transposes. The input's
  # gradient first: elementwise work that waits for it then runs beside this product.
  wide = at_least_float32(g.dtype)
  dkernel = jnp.matmul(cpu_barrier(x.T), cpu_after(g, dx), preferred_element_type=wide)
  dbias = None if bias is None else widen(g).sum(axis=0).astype(bias.dtype)
  return dx, dkernel.astype(kernel.dtype), dbias


affine.defvjp(_affine_forward, _affine_backward)


class Linear(nnx.Linear):
  """`nnx.Linear` computed as one product of two matrices, whatever the leading axes.

  With three and more axes XLA's CPU backend copies activations for the weight's gradient: over the
  whole MAE step of HiViT-B these copies took longer than the products.
  """

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """(..., in_features) -> (..., out_features)."""
    x = inputs.reshape(-1, inputs.shape[-1]).astype(self.dtype)
    out = affine(x, self.kernel[...], None if self.bias is None else self.bias[...])
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
  init = initializers.normal(std)
  return Linear(
    in_features, out_features, use_bias=use_bias, kernel_init=init, dtype=dtype, rngs=rngs
  )
