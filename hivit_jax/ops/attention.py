"""Softmax attention.

In functions of q, k and v these are (..., heads, N, D), q scaled already; bias is added to the
logits: (heads, N, N), with any of the leading axes of q before it. The result is (..., heads, N, D)
in the type of v.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hivit_jax.ops.precision import at_least_float32

_LONG = 128  # tokens from which on cuDNN's kernel is faster than XLA's (H100)


def of_projection(
  attend: Callable[..., jax.Array], qkv: jax.Array, heads: int, bias: jax.Array | None = None
) -> jax.Array:
  """Attention from the output of one Linear.

  Args:
    attend: a function of q, k, v and bias.
    qkv: (..., N, 3 * C): queries, keys and values, the channels of each head together.
    heads: their number.
    bias: see above.

  Returns:
    (..., N, C): softmax(q k^T / sqrt(D) + bias) v.
  """
  *leading, n, c = qkv.shape
  d = c // 3 // heads
  q, k, v = (
    part.reshape(*leading, n, heads, d).swapaxes(-3, -2)  # (..., heads, N, D)
    for part in jnp.split(qkv, 3, axis=-1)
  )
  return attend(q * d**-0.5, k, v, bias).swapaxes(-3, -2).reshape(*leading, n, c // 3)


def weights(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """softmax(q k^T + bias), (..., heads, N, N), at least float32; every row adds to 1."""
  wide = at_least_float32(q.dtype)
  logits = jnp.einsum('...qd,...kd->...qk', q, k, preferred_element_type=wide)
  if bias is not None:
    logits = logits + bias
  return jax.nn.softmax(logits, axis=-1)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """`weights` times v, in the type of v."""
  return jnp.einsum('...qk,...kd->...qd', weights(q, k, bias).astype(v.dtype), v)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """cuDNN's kernel where it fits, which writes no logits to memory; `plain` elsewhere.

  For NVIDIA GPUs of compute capability 8.0 and more. It fits in bfloat16, without a bias or with
  one that all examples and windows share and N even, up to 128 channels a head in multiples of 8.
  cuDNN gets the bias in the type of q.
  """
  *_, heads, n, d = q.shape
  shared = bias is None or (bias.shape == (heads, n, n) and n % 2 == 0)
  if q.dtype == jnp.bfloat16 and d % 8 == 0 and d <= 128 and shared:
    return _attend_by_cudnn(q, k, v, bias)
  return plain(q, k, v, bias)


def auto(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """`cudnn` where it is faster on an NVIDIA GPU and sums nothing in bfloat16.

  It is slower for few tokens or an odd number, and it rounds a bias and its gradient.
  """
  n = q.shape[-2]
  return (cudnn if bias is None and n >= _LONG and n % 2 == 0 else plain)(q, k, v, bias)


def _attend_by_cudnn(q, k, v, bias):
  n = q.shape[-2]
  # JAX accepts even lengths only, when it has to differentiate: one masked unit more.
  lengths = jnp.full(math.prod(q.shape[:-3]), n, jnp.int32) if n % 2 else None

  def rows_first(x):  # -> (batch, N, heads, D)
    x = x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, n % 2), (0, 0), (0, 0)))

  out = jax.nn.dot_product_attention(
    *map(rows_first, (q, k, v)),
    bias=None if bias is None else bias[None].astype(q.dtype),
    scale=1.0,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation='cudnn',
  )
  return out[:, :n].swapaxes(1, 2).reshape(q.shape)


def projected(qkv: jax.Array, heads: int, bias: jax.Array | None = None) -> jax.Array:
  """`plain`, of a projection."""
  return of_projection(plain, qkv, heads, bias)


def projected_auto(qkv: jax.Array, heads: int, bias: jax.Array | None = None) -> jax.Array:
  """`auto`, of a projection."""
  return of_projection(auto, qkv, heads, bias)


def projected_cudnn(qkv: jax.Array, heads: int, bias: jax.Array | None = None) -> jax.Array:
  """`cudnn`, of a projection."""
  return of_projection(cudnn, qkv, heads, bias)
