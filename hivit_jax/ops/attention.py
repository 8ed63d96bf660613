"""Softmax attention that keeps no (N, N) array for the backward pass."""

import math

import jax
import jax.numpy as jnp

from hivit_jax.ops.barriers import cpu_barrier
from hivit_jax.ops.precision import at_least_float32, widen

IMPLEMENTATIONS = ('xla', 'cudnn')


def _wide_einsum(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=at_least_float32(x.dtype))


def _logits(q, k, bias):
  logits = _wide_einsum('...qd,...kd->...qk', q, k)
  return logits if bias is None else logits + bias


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None = None,
  *,
  implementation: str = 'xla',
) -> jax.Array:
  """softmax(q k^T + bias) v.

  Args:
    q: (..., heads, N, D), scaled already.
    k, v: (..., heads, N, D).
    bias: added to the logits: (heads, N, N), with any of the leading axes of q before it.
    implementation: 'xla'; or 'cudnn': a kernel that writes no logits to memory, for NVIDIA GPUs of
      compute capability 8.0 and more. Used where it fits: in bfloat16, without a bias or with one
      that all examples and windows share and N even, up to 128 channels a head in multiples of 8.

  Returns:
    (..., heads, N, D). Logits and softmax are at least float32; cuDNN gets the bias
    in their dtype.
  """
  if implementation == 'cudnn' and _fits_cudnn(q, bias):
    return _attend_by_cudnn(q, k, v, bias)
  return _attend(q, k, v, bias)


def _fits_cudnn(q, bias):
  *_, heads, n, d = q.shape
  shared = bias is None or (bias.shape == (heads, n, n) and n % 2 == 0)
  return q.dtype == jnp.bfloat16 and d % 8 == 0 and d <= 128 and shared


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


@jax.custom_vjp
def _attend(q, k, v, bias):
  return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
  out, log_total = jax.lax.platform_dependent(
    q, k, v, bias, cpu=_forward_cpu, tpu=_forward_tpu, default=_forward_default
  )
  return out, (q, k, v, bias, out, log_total)


def _forward_default(q, k, v, bias):
  weights, largest = _weights(q, k, bias)
  total = weights.sum(axis=-1, keepdims=True)
  return _normalise(_weighted(weights.astype(v.dtype), v), largest, total, v.dtype)


def _weights(q, k, bias):
  """What softmax divides by its sum, and the largest logit of each query."""
  logits = _logits(q, k, bias)
  largest = logits.max(axis=-1, keepdims=True)
  return jnp.exp(logits - largest), largest


def _weighted(weights, v):
  return _wide_einsum('...qk,...kd->...qd', weights, v)


def _normalise(out, largest, total, dtype):
  return (out / total).astype(dtype), largest + jnp.log(total)


def _forward_tpu(q, k, v, bias):
  # The product takes the sums, too, with a column of ones where a tile of 128 is filled up anyway.
  if v.shape[-1] % 128 == 0:
    return _forward_default(q, k, v, bias)
  weights, largest = _weights(q, k, bias)
  values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  out = _weighted(weights.astype(v.dtype), values)
  return _normalise(out[..., :-1], largest, out[..., -1:], v.dtype)


def _forward_cpu(q, k, v, bias):
  # While nothing but the output is used, XLA makes one kernel of it, which takes half the time.
  out, log_total = _forward_default(q, k, v, bias)
  return out, jnp.zeros_like(log_total)


def _backward(residuals, g):
  return jax.lax.platform_dependent(*residuals, g, cpu=_backward_cpu, default=_backward_default)


def _backward_default(q, k, v, bias, out, log_total, g):
  return _gradients(jnp.exp(_logits_of_keys(q, k, bias) - log_total.mT), q, k, v, bias, out, g)


def _backward_cpu(q, k, v, bias, out, log_total, g):
  del log_total  # `_forward_cpu` has not kept it
  logits = _logits_of_keys(q, k, bias)
  weights = jnp.exp(logits - logits.max(axis=-2, keepdims=True))
  total = weights.sum(axis=-2, keepdims=True).mT
  return _gradients(weights, q, k, v, bias, out, (widen(g) / total).astype(g.dtype))


def _logits_of_keys(q, k, bias):
  """(..., heads, keys, queries)."""
  return _logits(k, q, None if bias is None else bias.mT)


def _gradients(weights, q, k, v, bias, out, g):
  # All (N, N) arrays are (keys, queries) here: then one product of five transposes an operand of
  # its own, else two would, which CPUs are slow at. That one transposes the smaller operand.
  # The weights of a query need not add up to 1 if its row of g is divided by their sum.
  dv = jnp.einsum('...kq,...qd->...kd', weights.astype(g.dtype), g)
  # Barriers: a product into which XLA fuses elementwise work is its slow one.
  dweights = cpu_barrier(_wide_einsum('...kd,...qd->...kq', v, g))
  # sum_k weights * dweights, without the (N, N) product
  mean = cpu_barrier((widen(out) * widen(g)).sum(axis=-1, keepdims=True))
  dlogits = weights * (dweights - mean.mT)
  dbias = None
  if bias is not None:
    dbias = _sum_leading(dlogits, bias.ndim).mT.astype(bias.dtype)
  dlogits = cpu_barrier(dlogits.astype(q.dtype))
  dq = cpu_barrier(cpu_barrier(k.mT) @ dlogits).mT
  dk = jnp.einsum('...kq,...qd->...kd', dlogits, q)
  return dq, dk, dv, dbias


def _sum_leading(x: jax.Array, ndim: int) -> jax.Array:
  """Sums over all axes but the last `ndim`."""
  kept = x.shape[-ndim:]

  def product(x):  # XLA's CPU backend takes ten times as long for the sum
    rows = x.reshape(-1, math.prod(kept))
    return (jnp.ones((1, len(rows)), x.dtype) @ rows).reshape(kept)

  axes = tuple(range(x.ndim - ndim))
  return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(axis=axes))


_attend.defvjp(_forward, _backward)
