"""Softmax attention.

In all functions q, k and v are (..., heads, N, D), q scaled already; bias is added to the logits:
(heads, N, N), with any of the leading axes of q before it. The result is (..., heads, N, D) in the
type of v; logits and softmax are at least float32.
"""

import math

import jax
import jax.numpy as jnp

from hivit_jax.ops.precision import at_least_float32, widen


def plain(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """softmax(q k^T + bias) v."""
  weights = jax.nn.softmax(_logits(q, k, bias), axis=-1)
  return _weighted(weights.astype(v.dtype), v).astype(v.dtype)


def _wide_einsum(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=at_least_float32(x.dtype))


def _logits(q, k, bias):
  logits = _wide_einsum('...qd,...kd->...qk', q, k)
  return logits if bias is None else logits + bias


def _weighted(weights, v):
  return _wide_einsum('...qk,...kd->...qd', weights, v)


@jax.custom_vjp
def _attend(q, k, v, bias):
  return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
  out, log_total = jax.lax.platform_dependent(
    q, k, v, bias, tpu=_forward_tpu, default=_forward_default
  )
  return out, (q, k, v, bias, out, log_total)


def _forward_default(q, k, v, bias):
  weights, largest = _weights(q, k, bias)
  total = weights.sum(axis=-1, keepdims=True)
  return _divided(_weighted(weights.astype(v.dtype), v), largest, total, v.dtype)


def _forward_tpu(q, k, v, bias):
  # The product takes the sums, too, with a column of ones where a tile of 128 is filled up anyway.
  if v.shape[-1] % 128 == 0:
    return _forward_default(q, k, v, bias)
  weights, largest = _weights(q, k, bias)
  values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  out = _weighted(weights.astype(v.dtype), values)
  return _divided(out[..., :-1], largest, out[..., -1:], v.dtype)


def _weights(q, k, bias):
  """What softmax divides by its sum, and the largest logit of each query."""
  logits = _logits(q, k, bias)
  largest = logits.max(axis=-1, keepdims=True)
  return jnp.exp(logits - largest), largest


def _divided(out, largest, total, dtype):
  return (out / total).astype(dtype), largest + jnp.log(total)


def _backward(residuals, g):
  q, k, v, bias, out, log_total = residuals
  weights = jnp.exp(_logits(q, k, bias) - log_total)
  dv = jnp.einsum('...qk,...qd->...kd', weights.astype(g.dtype), g)
  # sum_k weights * dweights, without the (N, N) product
  mean = (widen(out) * widen(g)).sum(axis=-1, keepdims=True)
  dlogits = weights * (_wide_einsum('...qd,...kd->...qk', g, v) - mean)
  dbias = None
  if bias is not None:
    dbias = dlogits.sum(axis=tuple(range(dlogits.ndim - bias.ndim))).astype(bias.dtype)
  dlogits = dlogits.astype(q.dtype)
  return dlogits @ k, jnp.einsum('...qk,...qd->...kd', dlogits, q), dv, dbias


_attend.defvjp(_forward, _backward)


def fast(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """`plain` that keeps no (N, N) array for the backward pass, which computes the logits again."""
  return _attend(q, k, v, bias)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """cuDNN's kernel where it fits, which writes no logits to memory; `fast` elsewhere.

  For NVIDIA GPUs of compute capability 8.0 and more. It fits in bfloat16, without a bias or with
  one that all examples and windows share and N even, up to 128 channels a head in multiples of 8.
  cuDNN gets the bias in the type of q.
  """
  *_, heads, n, d = q.shape
  shared = bias is None or (bias.shape == (heads, n, n) and n % 2 == 0)
  if q.dtype == jnp.bfloat16 and d % 8 == 0 and d <= 128 and shared:
    return _attend_by_cudnn(q, k, v, bias)
  return fast(q, k, v, bias)


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
