"""Layers that the models share. Attribute names are those of the PyTorch implementations."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models import positions

LAYER_NORM_EPS = 1e-6
_normal = nnx.initializers.normal(0.02)


def linear(
  in_features: int,
  out_features: int,
  *,
  rngs: nnx.Rngs,
  dtype: Any,
  use_bias: bool = True,
  kernel_init: Callable = _normal,
) -> nnx.Linear:
  """Linear layer with the initialisation of the reference.

  The reference draws from a normal of standard deviation 0.02 cut at +-2 (absolute, 100 standard
  deviations), which is a plain normal; biases start at zero.
  """
  return nnx.Linear(
    in_features,
    out_features,
    use_bias=use_bias,
    kernel_init=kernel_init,
    dtype=dtype,
    rngs=rngs,
  )


def layer_norm(features: int, *, rngs: nnx.Rngs, dtype: Any) -> nnx.LayerNorm:
  """LayerNorm over the last axis; statistics in float32 whatever `dtype` is."""
  # The fast variance E[x^2] - E[x]^2 cancels badly for features with a large mean.
  return nnx.LayerNorm(
    features, epsilon=LAYER_NORM_EPS, use_fast_variance=False, dtype=dtype, rngs=rngs
  )


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU."""
  return jax.nn.gelu(x, approximate=False)


def torch_conv_init(fan_in: int) -> Callable:
  """PyTorch's default initialisation of a convolution, for its weight and its bias."""
  bound = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def drop_path(x: jax.Array, rate: jax.Array | float, rng: jax.Array | None) -> jax.Array:
  """Drops whole residual branches per example (stochastic depth, arXiv 1603.09382).

  Args:
    x: (B, ...) output of a residual branch.
    rate: probability of dropping; survivors are scaled by `1 / (1 - rate)`.
    rng: PRNG key; None switches it off.
  """
  if rng is None:
    return x
  keep = 1.0 - rate
  shape = (x.shape[0],) + (1,) * (x.ndim - 1)
  mask = jax.random.bernoulli(rng, keep, shape)
  return x * (mask / keep).astype(x.dtype)


class Mlp(nnx.Module):
  """Linear, GELU, Linear."""

  def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs, dtype: Any):
    self.fc1 = linear(features, hidden, rngs=rngs, dtype=dtype)
    self.fc2 = linear(hidden, features, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(gelu(self.fc1(x)))


class Attention(nnx.Module):
  """Multi-head self-attention with a fused qkv projection and an optional relative position bias.

  Args:
    features: channels C, a multiple of `heads`.
    heads: number of heads.
    grid: (rows, columns) of the unit grid when a relative position bias is wanted, else None.
  """

  def __init__(
    self,
    features: int,
    heads: int,
    *,
    rngs: nnx.Rngs,
    dtype: Any,
    grid: tuple[int, int] | None = None,
    table_init: Callable = _normal,
  ):
    if features % heads:
      raise ValueError(f'{features} channels cannot be split into {heads} heads')
    self.heads = heads
    self.grid = grid
    self.qkv = linear(features, 3 * features, rngs=rngs, dtype=dtype)
    self.proj = linear(features, features, rngs=rngs, dtype=dtype)
    if grid is not None:
      entries = (2 * grid[0] - 1) * (2 * grid[1] - 1)
      self.relative_position_bias_table = nnx.Param(table_init(rngs.params(), (entries, heads)))

  def __call__(self, x: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    """Attends over all units of an example.

    Args:
      x: (B, N, C).
      ids: (B, N) grid positions of the units when some are dropped; only the bias reads it.

    Returns:
      (B, N, C).
    """
    b, n, c = x.shape
    qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, N, heads, D)
    logits = jnp.einsum(
      'bqhd,bkhd->bhqk',
      q * (c // self.heads) ** -0.5,
      k,
      preferred_element_type=jnp.float32,
    )
    if self.grid is not None:
      table = self.relative_position_bias_table[...]
      logits += positions.relative_position_bias(table, self.grid, ids)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
    return self.proj(out.reshape(b, n, c))


class MlpBlock(nnx.Module):
  """Pre-norm residual MLP without attention: the block of HiViT's first two stages."""

  def __init__(self, features: int, *, mlp_ratio: float, rngs: nnx.Rngs, dtype: Any):
    self.norm2 = layer_norm(features, rngs=rngs, dtype=dtype)
    self.mlp = Mlp(features, int(features * mlp_ratio), rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array, *, rate: jax.Array | float = 0.0, rng=None) -> jax.Array:
    """x: (B, ..., C) -> the same shape; `rate` and `rng` as for `drop_path`."""
    return x + drop_path(self.mlp(self.norm2(x)), rate, rng)


class Block(nnx.Module):
  """Pre-norm transformer block: attention and MLP, each residual."""

  def __init__(
    self,
    features: int,
    heads: int,
    *,
    mlp_ratio: float,
    rngs: nnx.Rngs,
    dtype: Any,
    grid: tuple[int, int] | None = None,
    table_init: Callable = _normal,
  ):
    self.norm1 = layer_norm(features, rngs=rngs, dtype=dtype)
    self.attn = Attention(
      features, heads, rngs=rngs, dtype=dtype, grid=grid, table_init=table_init
    )
    self.norm2 = layer_norm(features, rngs=rngs, dtype=dtype)
    self.mlp = Mlp(features, int(features * mlp_ratio), rngs=rngs, dtype=dtype)

  def __call__(
    self,
    x: jax.Array,
    ids: jax.Array | None = None,
    *,
    rate: jax.Array | float = 0.0,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """x: (B, N, C) -> (B, N, C); `ids` as for `Attention`, `rate` and `rng` for `drop_path`."""
    rng1, rng2 = (None, None) if rng is None else jax.random.split(rng)
    x = x + drop_path(self.attn(self.norm1(x), ids), rate, rng1)
    return x + drop_path(self.mlp(self.norm2(x)), rate, rng2)


def apply_blocks(
  blocks: Sequence[nnx.Module],
  x: jax.Array,
  *args: jax.Array | None,
  rates: Sequence[float],
  rng: jax.Array | None,
  remat: bool,
  scan: bool,
) -> jax.Array:
  """Runs blocks of one shape in sequence.

  Args:
    blocks: modules called as `block(x, *args, rate=..., rng=...)`.
    x: (B, ...) input of the first block.
    *args: further inputs, the same for every block.
    rates: drop path rate of each block.
    rng: PRNG key for drop path, or None.
    remat: recompute each block's activations in the backward pass instead of keeping them.
    scan: stack the parameters and compile the block once (`lax.scan`): compile time independent of
      the depth, for one copy of the parameters a step.

  Returns:
    The last block's output.
  """
  if not blocks:
    return x
  rngs = None if rng is None else jax.random.split(rng, len(blocks))
  graphdef = nnx.graphdef(blocks[0])

  def body(x, layer):
    params, rate, key = layer
    return nnx.merge(graphdef, params)(x, *args, rate=rate, rng=key), None

  if remat:
    body = jax.checkpoint(body, prevent_cse=not scan)
  params = [nnx.state(block) for block in blocks]
  if scan and len(blocks) > 1:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(body, x, (stacked, jnp.asarray(rates, jnp.float32), rngs))[0]
  for i, layer_params in enumerate(params):
    x, _ = body(x, (layer_params, rates[i], None if rngs is None else rngs[i]))
  return x
