"""Linear layers, with float32 sums in the gradients of their parameters."""

import jax
import jax.numpy as jnp

from hivit_jax.ops.precision import at_least_float32, widen


def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
  """x kernel + bias, in the type of `x`: (rows, in), (in, out), (out,) -> (rows, out)."""
  out = x @ kernel.astype(x.dtype)
  return out if bias is None else out + bias.astype(x.dtype)


@jax.custom_vjp
def _linear(x, kernel, bias):
  return plain(x, kernel, bias)


def _forward(x, kernel, bias):
  return plain(x, kernel, bias), (x, kernel, bias)


def _backward(residuals, g):
  x, kernel, bias = residuals
  dx = g @ kernel.astype(g.dtype).T
  dkernel = jnp.matmul(x.T, g, preferred_element_type=at_least_float32(g.dtype))
  dbias = None if bias is None else widen(g).sum(axis=0).astype(bias.dtype)
  return dx, dkernel.astype(kernel.dtype), dbias


_linear.defvjp(_forward, _backward)


def fast(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
  """`plain`, whose gradients of kernel and bias are float32 sums also where `x` is bfloat16.

  Sums over devices are float32, too: bfloat16's eight significant bits would lose precision with
  every device.
  """
  return _linear(x, kernel, bias)
