"""Layers that the models share. Attribute names are those of the PyTorch implementations."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import positions, resize
from hivit_jax.ops import initializers
from hivit_jax.ops.choice import FAST, Ops
from hivit_jax.ops.gelu import gelu
from hivit_jax.ops.modules import layer_norm, linear
from hivit_jax.ops.precision import widen

_normal = initializers.normal(0.02)
NEVER = -1e9  # logit of a unit that is not attended to; its weight is 0 in any type


def add_parameter(x: jax.Array, parameter: jax.Array) -> jax.Array:
  """`x + parameter` in the type of `x`; the parameter's gradient is a sum in at least float32."""
  return (widen(x) + parameter).astype(x.dtype)


def torch_conv_init(fan_in: int) -> Callable:
  """PyTorch's default initialisation of a convolution, for its weight and its bias."""
  return initializers.uniform(1 / math.sqrt(fan_in))


def drop_path(x: jax.Array, rate: jax.Array | float, noise: jax.Array | None) -> jax.Array:
  """Drops whole residual branches per example (stochastic depth, arXiv 1603.09382).

  Args:
    x: (B, ...) output of a residual branch.
    rate: probability of dropping; survivors are scaled by `1 / (1 - rate)`.
    noise: (B,) uniform in [0, 1); None switches it off. Numbers instead of a key, because a part of
      a batch takes its part of the numbers: accumulated gradients equal those of the whole batch.
  """
  if noise is None:
    return x
  keep = 1.0 - rate
  scale = jnp.where(noise < keep, 1.0 / keep, 0.0).astype(x.dtype)
  return x * scale.reshape(-1, *(1,) * (x.ndim - 1))


def rising_rates(largest: float, count: int) -> tuple[float, ...]:
  """Drop path rates that rise linearly from 0 over all blocks."""
  if not 0 <= largest < 1:
    raise UserError(f'drop_path_rate must be at least 0 and below 1, got {largest}')
  return tuple(largest * i / max(count - 1, 1) for i in range(count))


class Mlp(nnx.Module):
  """Linear, GELU, Linear."""

  def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs, dtype: Any):
    self.fc1 = linear(features, hidden, rngs=rngs, dtype=dtype)
    self.fc2 = linear(hidden, features, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])  # TPUs copy hidden layers of other shapes between products
    return self.fc2(gelu(self.fc1(rows))).reshape(x.shape)


class Attention(nnx.Module):
  """Multi-head self-attention with a fused qkv projection and an optional relative position bias.

  Args:
    features: channels C, a multiple of `heads`.
    heads: number of heads.
    grid: (rows, columns) of the unit grid when a relative position bias is wanted, else None.
  """

  ops: Ops = FAST

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
      raise UserError(f'num_heads={heads} does not divide {features} channels')
    self.heads = heads
    self.grid = grid
    self.qkv = linear(features, 3 * features, rngs=rngs, dtype=dtype)
    self.proj = linear(features, features, rngs=rngs, dtype=dtype)
    if grid is not None:
      entries = (2 * grid[0] - 1) * (2 * grid[1] - 1)
      self.relative_position_bias_table = nnx.Param(table_init(rngs.params(), (entries, heads)))

  def __call__(
    self,
    x: jax.Array,
    ids: jax.Array | None = None,
    grid: tuple[int, int] | None = None,
    keys: jax.Array | None = None,
    *,
    mask: np.ndarray | None = None,
  ) -> jax.Array:
    """Attends over all units of an example or window.

    Args:
      x: (B, N, C), or (B, W, N, C) of W windows.
      ids: (B, N) grid positions of the units when some are dropped; only the bias reads it.
      grid: (rows, columns) that the units come from when it is not the model's; the table of the
        bias is resized to it.
      keys: (B, N) bool, units that are attended to; None: all.
      mask: (W, N, N), added to the logits of a model with bias.

    Returns:
      The shape of `x`.
    """
    bias = None
    if self.grid is not None:
      grid = grid or self.grid
      table = resize.bias_table(self.relative_position_bias_table[...], self.grid, grid)
      bias = positions.relative_position_bias(table, grid, ids, ops=self.ops)
      if mask is not None:
        bias = bias + mask[:, None]
    if keys is not None:
      never = jnp.where(keys, 0.0, NEVER)[:, None, None]
      bias = never if bias is None else bias + never
    return self.proj(self.ops.attend(self.qkv(x), self.heads, bias))


def scaled(x: jax.Array, gamma: nnx.Param | None) -> jax.Array:
  """LayerScale (arXiv 2103.17239): `x` times a parameter (C,), in the type of `x`."""
  return x if gamma is None else (widen(x) * gamma[...]).astype(x.dtype)


class MlpBlock(nnx.Module):
  """Pre-norm residual MLP without attention: the block of HiViT's first two stages.

  Args:
    features: channels.
    mlp_ratio: hidden width, as a multiple of them.
    mlp: class of the MLP.
    layer_scale: see `Block`.
  """

  gamma_2: nnx.Param | None = None

  def __init__(
    self,
    features: int,
    *,
    mlp_ratio: float,
    rngs: nnx.Rngs,
    dtype: Any,
    mlp: Callable = Mlp,
    layer_scale: float | None = None,
  ):
    if layer_scale is not None:
      self.gamma_2 = nnx.Param(jnp.full(features, layer_scale))
    self.norm2 = layer_norm(features, rngs=rngs, dtype=dtype)
    self.mlp = mlp(features, int(features * mlp_ratio), rngs=rngs, dtype=dtype)

  def __call__(
    self, x: jax.Array, *, rate: jax.Array | float = 0.0, noise: jax.Array | None = None
  ) -> jax.Array:
    """x: (B, ..., C) -> the same shape; `rate` and `noise` (B, 2) are for `drop_path`."""
    noise2 = None if noise is None else noise[:, 1]
    return x + drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2), rate, noise2)


class Block(nnx.Module):
  """Pre-norm transformer block: attention and MLP, each residual.

  Args:
    features: channels C, a multiple of `heads`.
    heads: of the attention.
    mlp_ratio: hidden width of the MLP, as a multiple of C.
    grid, table_init: see `Attention`.
    mlp: class of the MLP.
    layer_scale: what the scales of both branches start as; None: no scales.
  """

  gamma_1: nnx.Param | None = None
  gamma_2: nnx.Param | None = None

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
    mlp: Callable = Mlp,
    layer_scale: float | None = None,
  ):
    if layer_scale is not None:
      self.gamma_1 = nnx.Param(jnp.full(features, layer_scale))
      self.gamma_2 = nnx.Param(jnp.full(features, layer_scale))
    self.norm1 = layer_norm(features, rngs=rngs, dtype=dtype)
    self.attn = Attention(features, heads, rngs=rngs, dtype=dtype, grid=grid, table_init=table_init)
    self.norm2 = layer_norm(features, rngs=rngs, dtype=dtype)
    self.mlp = mlp(features, int(features * mlp_ratio), rngs=rngs, dtype=dtype)

  def __call__(
    self,
    x: jax.Array,
    ids: jax.Array | None = None,
    grid: tuple[int, int] | None = None,
    keys: jax.Array | None = None,
    *,
    rate: jax.Array | float = 0.0,
    noise: jax.Array | None = None,
  ) -> jax.Array:
    """x: (B, N, C) -> the same shape.

    `ids`, `grid` and `keys` are as for `Attention`; `rate` and `noise` (B, 2) are for `drop_path`.
    """
    noise1, noise2 = (None, None) if noise is None else (noise[:, 0], noise[:, 1])
    x = x + drop_path(scaled(self.attn(self.norm1(x), ids, grid, keys), self.gamma_1), rate, noise1)
    return x + drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2), rate, noise2)


def apply_blocks(
  blocks: Sequence[nnx.Module],
  x: jax.Array,
  *args: Any,
  rates: Sequence[float],
  noise: jax.Array | None,
  remat: bool,
  scan: bool,
) -> jax.Array:
  """Runs blocks of one shape in sequence.

  Args:
    blocks: modules called as `block(x, *args, rate=..., noise=...)`.
    x: (B, ...) input of the first block.
    *args: further inputs, the same for every block.
    rates: drop path rate of each block.
    noise: (len(blocks), B, 2) uniform numbers for drop path, or None.
    remat: recompute each block's activations in the backward pass instead of keeping them.
    scan: stack the parameters and compile the block once (`lax.scan`): compile time independent of
      the depth, for one copy of the parameters a step.

  Returns:
    The last block's output.
  """
  if not blocks:
    return x
  graphdef = nnx.graphdef(blocks[0])

  def body(x, layer):
    params, rate, noise = layer
    return nnx.merge(graphdef, params)(x, *args, rate=rate, noise=noise), None

  if remat:
    body = jax.checkpoint(body, prevent_cse=not scan)
  params = [nnx.state(block) for block in blocks]
  if scan and len(blocks) > 1:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(body, x, (stacked, jnp.asarray(rates, jnp.float32), noise))[0]
  for i, layer_params in enumerate(params):
    x, _ = body(x, (layer_params, rates[i], None if noise is None else noise[i]))
  return x
