"""Attention over few tokens as two Triton kernels that read and write the fused projection itself.

All tokens of a head fit into one block: softmax needs no second pass, the backward pass computes
the weights again from q and k alone, and nothing is split, padded or joined in memory. What it
measured on an H100 is in docs/internals/performance-ledger.md. Pallas' Triton backend is deprecated
in JAX 0.11 and still there in 0.12.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

from hivit_jax.ops import attention

MOST = 64  # tokens; with 196 the kernels were no faster than cuDNN's
_LEAST = 16  # rows of the smallest product on tensor cores


def attend(
  qkv: jax.Array, heads: int, bias: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
  """The kernels where they fit, `attention.auto` elsewhere: for NVIDIA GPUs the fastest.

  They fit in bfloat16, without a bias, at most `MOST` tokens and heads of 16, 32, 64 or 128
  channels. Of a batch that is split over devices, each computes its own examples.

  Args:
    qkv, heads, bias: as for `attention.of_projection`, and so is the result.
    interpret: run the kernels by JAX's own operations, on any device.
  """
  *leading, n, c = qkv.shape
  d = c // 3 // heads
  if bias is not None or qkv.dtype != jnp.bfloat16 or n > MOST or d not in (16, 32, 64, 128):
    return attention.projected_auto(qkv, heads, bias)
  out: Any = _attend(qkv.reshape(-1, n, 3, heads, d), interpret)
  return out.reshape(*leading, n, c // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(qkv, interpret):
  """(B, N, 3, heads, D) -> (B, N, heads, D)."""
  return _by_example(_attended, 'b n t h d -> b n h d', interpret)(qkv)


def _forward(qkv, interpret):
  return _attend(qkv, interpret), qkv


def _backward(interpret, qkv, g):
  return (_by_example(_gradient, 'b n t h d, b n h d -> b n t h d', interpret)(qkv, g),)


_attend.defvjp(_forward, _backward)


@functools.cache
def _by_example(function, rule, interpret):
  """A function of arrays (B, ...), of which every device and every call under vmap has a part.

  XLA cannot look into a kernel, and would gather the whole batch on every device.
  """
  function = functools.partial(function, interpret)
  partitioned = custom_partitioning(function)

  def partition(mesh, arguments, result):
    spec = arguments[0].sharding.spec
    own = NamedSharding(mesh, PartitionSpec(spec[0] if len(spec) else None))
    return mesh, function, own, (own,) * len(arguments)

  partitioned.def_partition(
    partition=partition, sharding_rule=rule, need_replication_factors=('n', 't', 'h', 'd')
  )
  call = jax.custom_batching.custom_vmap(partitioned)

  @call.def_vmap
  def _(size, batched, *arrays):
    arrays = [
      x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
      for x, is_batched in zip(arrays, batched, strict=True)
    ]
    out = call(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
    return out.reshape(size, -1, *out.shape[1:]), True

  return call


def _attended(interpret, qkv):
  b, n, _, heads, d = qkv.shape
  shape = jax.ShapeDtypeStruct((b, n, heads, d), qkv.dtype)
  return _call(_forward_kernel, [qkv] * 3, [*_parts(qkv)], _block(shape), shape, interpret)


def _gradient(interpret, qkv, g):
  of_qkv = pl.BlockSpec((None, _rows(qkv), 3, None, qkv.shape[-1]), lambda b, h: (b, 0, 0, h, 0))
  blocks = [*_parts(qkv), _block(g)]
  shape = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)
  return _call(_backward_kernel, [qkv, qkv, qkv, g], blocks, of_qkv, shape, interpret)


def _call(kernel, arrays, blocks, out_block, out_shape, interpret):
  """A program for each example and head."""
  b, n, *_, heads, d = arrays[0].shape
  return pl.pallas_call(
    functools.partial(kernel, n=n, scale=d**-0.5),
    grid=(b, heads),
    in_specs=blocks,
    out_specs=out_block,
    out_shape=out_shape,
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
  )(*arrays)


def _rows(x):
  return max(_LEAST, 2 ** math.ceil(math.log2(x.shape[1])))  # Triton's blocks are powers of two


def _parts(qkv):
  """Blocks with all of q, of k and of v of a head."""

  def block(i):
    return pl.BlockSpec((None, _rows(qkv), None, None, qkv.shape[-1]), lambda b, h: (b, 0, i, h, 0))

  return map(block, range(3))


def _block(x):
  """Block with all tokens of a head: of (B, N, heads, D)."""
  return pl.BlockSpec((None, _rows(x), None, x.shape[-1]), lambda b, h: (b, 0, h, 0))


def _real(shape, axis, n):
  """Where there is a token along an axis: blocks have more rows than there are tokens."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < n


def _load(ref, n):
  return triton.load(ref, mask=_real(ref.shape, 0, n), other=0.0)


def _store(ref, value, n):
  triton.store(ref, value.astype(jnp.bfloat16), mask=_real(value.shape, 0, n))


def _weights(logits, axis, n):
  """Softmax over the keys of real tokens: what is divided by the sum, and the sum."""
  logits = jnp.where(_real(logits.shape, axis, n), logits, -1e30)
  weights = jnp.exp(logits - jnp.max(logits, axis=axis, keepdims=True))
  return weights, jnp.sum(weights, axis=axis, keepdims=True)


def _forward_kernel(q, k, v, out, *, n, scale):
  q, k, v = (_load(ref, n) for ref in (q, k, v))
  weights, total = _weights(triton.dot(q, k.T) * scale, 1, n)
  _store(out, triton.dot(weights.astype(v.dtype), v) / total, n)


def _backward_kernel(q, k, v, g, dqkv, *, n, scale):
  q, k, v, g = (_load(ref, n) for ref in (q, k, v, g))
  # All (keys, queries): then one product transposes an operand, else two would.
  weights, total = _weights(triton.dot(k, q.T) * scale, 0, n)
  weights = weights / total
  dv = triton.dot(weights.astype(v.dtype), g)
  dweights = triton.dot(v, g.T)
  mean = jnp.sum(weights * dweights, axis=0, keepdims=True)
  dlogits = (weights * (dweights - mean) * scale).astype(k.dtype)
  gradients = (triton.dot(dlogits.T, k), triton.dot(dlogits, q), dv)
  for i, gradient in enumerate(gradients):
    _store(dqkv.at[:, jnp.int32(i), :], gradient, n)
