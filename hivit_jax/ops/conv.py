"""Convolutions of stride 1, with float32 sums in the gradients of their kernels."""

import jax

from hivit_jax.ops.precision import at_least_float32


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x * kernel, zeros around the borders, in the type of `x`.

  Args:
    x: (B, H, W, in).
    kernel: (rows, columns, in, out), both sides odd.

  Returns:
    (B, H, W, out).
  """
  rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype),
    (1, 1),
    ((rows, rows), (columns, columns)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


@jax.custom_vjp
def _convolve(x, kernel):
  return plain(x, kernel)


def _forward(x, kernel):
  return plain(x, kernel), (x, kernel)


def _backward(residuals, g):
  x, kernel = residuals
  rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
  dx = plain(g, kernel[::-1, ::-1].swapaxes(2, 3))
  # Sums over examples and places: examples take the part of channels, channels that of examples.
  dkernel = jax.lax.conv_general_dilated(
    x,
    g,
    (1, 1),
    ((rows, rows), (columns, columns)),
    dimension_numbers=('CHWN', 'IHWO', 'HWNC'),
    preferred_element_type=at_least_float32(g.dtype),
  )
  return dx, dkernel.astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)


def fast(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`plain`, whose gradient of the kernel is a float32 sum also where `x` is bfloat16.

  The reason is that of `ops.linear`.
  """
  return _convolve(x, kernel)
