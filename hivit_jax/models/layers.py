"""Layers that the models share. Attribute names are those of the PyTorch implementations."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import attention, positions, resize
from hivit_jax.models.barriers import cpu_after, cpu_barrier, cuda_barrier
from hivit_jax.models.precision import at_least_float32, widen

LAYER_NORM_EPS = 1e-6
BATCH_NORM_EPS = 1e-6
_normal = nnx.initializers.normal(0.02)


@jax.custom_vjp
def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
  """(rows, in), (in, out), (out,) -> (rows, out), in the type of `x`.

  The gradients of kernel and bias are float32 sums also where `x` is bfloat16, and so is what
  devices add up: with eight significant bits the sum would get worse with every device.
  """
  out = x @ kernel.astype(x.dtype)
  return out if bias is None else out + bias.astype(x.dtype)


def _affine_forward(x, kernel, bias):
  return _affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(residuals, g):
  x, kernel, bias = residuals
  dx = g @ kernel.astype(g.dtype).T
  # CPUs: a transpose and a plain product are faster than a product that transposes. The input's
  # gradient first: elementwise work that waits for it then runs beside this product.
  wide = at_least_float32(g.dtype)
  dkernel = jnp.matmul(cpu_barrier(x.T), cpu_after(g, dx), preferred_element_type=wide)
  dbias = None if bias is None else widen(g).sum(axis=0).astype(bias.dtype)
  return dx, dkernel.astype(kernel.dtype), dbias


_affine.defvjp(_affine_forward, _affine_backward)


def add_parameter(x: jax.Array, parameter: jax.Array) -> jax.Array:
  """`x + parameter` in the type of `x`; the parameter's gradient is a sum in at least float32."""
  return (widen(x) + parameter).astype(x.dtype)


class Linear(nnx.Linear):
  """`nnx.Linear` computed as one product of two matrices, whatever the leading axes.

  With three and more axes XLA's CPU backend copies activations for the weight's gradient: over the
  whole MAE step of HiViT-B these copies took longer than the products.
  """

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """(..., in_features) -> (..., out_features)."""
    x = inputs.reshape(-1, inputs.shape[-1]).astype(self.dtype)
    out = _affine(x, self.kernel[...], None if self.bias is None else self.bias[...])
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
  init = nnx.initializers.normal(std)
  return Linear(
    in_features, out_features, use_bias=use_bias, kernel_init=init, dtype=dtype, rngs=rngs
  )


@jax.custom_vjp
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  return _normalise_forward(x, scale, bias, epsilon)[0]


def _normalise_forward(x, scale, bias, epsilon):
  x32 = widen(x)
  mean = x32.mean(axis=-1, keepdims=True)
  # Not the fast variance E[x^2] - E[x]^2, which cancels badly for features with a large mean.
  rsqrt = jax.lax.rsqrt(jnp.square(x32 - mean).mean(axis=-1, keepdims=True) + epsilon)
  out = (x32 - mean) * rsqrt * scale + bias
  return out.astype(x.dtype), (x, mean, rsqrt, scale)


def _normalise_backward(residuals, g):
  x, mean, rsqrt, scale = residuals
  product, normal, g32 = _product_with_normal(x, mean, rsqrt, g)
  along = (product * scale).mean(axis=-1, keepdims=True)
  dx = rsqrt * (g32 * scale - (g32 * scale).mean(axis=-1, keepdims=True) - normal * along)
  # GPUs: without a barrier XLA writes the product to memory, in float32, for this sum.
  product, _, g32 = _product_with_normal(*cuda_barrier(x, mean, rsqrt, g))
  return dx.astype(x.dtype), product.sum(axis=0), g32.sum(axis=0), None


def _product_with_normal(x, mean, rsqrt, g):
  g = widen(g)
  normal = (widen(x) - mean) * rsqrt
  return g * normal, normal, g


_normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nnx.LayerNorm):
  """LayerNorm over the last axis; statistics in at least float32.

  Differentiated by hand: for the backward pass it keeps its input and two numbers a row, and takes
  four sums instead of the seven that follow from its parts.
  """

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """(..., features) -> the same shape."""
    if mask is not None:
      raise NotImplementedError('nnx.LayerNorm takes a mask, this one does not')
    rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    params: Any = self
    out = _normalise(rows, params.scale[...], params.bias[...], self.epsilon)
    return out.reshape(x.shape)


def layer_norm(
  features: int, *, rngs: nnx.Rngs, dtype: Any, epsilon: float = LAYER_NORM_EPS
) -> LayerNorm:
  """LayerNorm with the epsilon of the reference."""
  return LayerNorm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)


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


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU. For the backward pass it keeps its input and nothing else."""
  # With erf: the erfc of `jax.nn.gelu` is precise where x * cdf(x) vanishes, but twice as slow.
  return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


def _gelu_backward(x, g):
  x32 = widen(x)
  cdf = 0.5 * (1.0 + jax.lax.erf(x32 * 2**-0.5))
  density = jnp.exp(-0.5 * jnp.square(x32)) * (2 * math.pi) ** -0.5
  return ((widen(g) * (cdf + x32 * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def torch_conv_init(fan_in: int) -> Callable:
  """PyTorch's default initialisation of a convolution, for its weight and its bias."""
  return uniform_init(1 / math.sqrt(fan_in))


def uniform_init(bound: float) -> Callable:
  """Uniform in [-bound, bound)."""

  def init(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


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


def convolve_patches(conv: Any, patches: jax.Array, dtype: Any) -> jax.Array:
  """A convolution whose stride is its size: a product with its reshaped kernel.

  Args:
    conv: an `nnx.Conv`.
    patches: (..., h * w * channels), in (row, column, channel) order.
    dtype: of the computation.

  Returns:
    (..., features).
  """
  kernel = conv.kernel[...]
  rows = patches.reshape(-1, patches.shape[-1]).astype(dtype)
  x = _affine(rows, kernel.reshape(-1, kernel.shape[-1]), conv.bias[...])
  return x.reshape(*patches.shape[:-1], -1)


class StochasticDepth:
  """What a model with `drop_path` in its residual blocks has.

  Attributes:
    drop_path_rates: of all residual blocks.
  """

  drop_path_rates: tuple[float, ...]

  def drop_path_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide about one batch's residual branches: (batch, blocks, 2)."""
    return jax.random.uniform(rng, (batch, len(self.drop_path_rates), 2))


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


@jax.custom_vjp
def _split(qkv: jax.Array) -> tuple[jax.Array, ...]:
  """(..., N, 3, heads, D) -> q, k, v of (..., heads, N, D)."""
  return jax.lax.platform_dependent(
    qkv, tpu=_split_columns, default=lambda qkv: tuple(jnp.moveaxis(qkv, (-3, -2), (0, -3)))
  )


def _split_columns(qkv):
  # TPUs: an axis of 3 inside would be filled up to a tile.
  *leading, n, _, heads, d = qkv.shape
  parts = jnp.split(qkv.reshape(*leading, n, -1), 3, axis=-1)
  return tuple(x.reshape(*leading, n, heads, d).swapaxes(-3, -2) for x in parts)


def _split_backward(_, gradients):
  return (jax.lax.platform_dependent(*gradients, tpu=_join_columns, default=_join),)


def _join(*gradients):
  # CPUs: three transposes and then a plain concatenation; fused, they are five times as slow.
  return jnp.stack([cpu_barrier(g.swapaxes(-3, -2)) for g in gradients], axis=-3)


def _join_columns(*gradients):
  *leading, heads, n, d = gradients[0].shape
  rows = [g.swapaxes(-3, -2).reshape(*leading, n, heads * d) for g in gradients]
  return jnp.concatenate(rows, axis=-1).reshape(*leading, n, 3, heads, d)


_split.defvjp(lambda qkv: (_split(qkv), None), _split_backward)


class Attention(nnx.Module):
  """Multi-head self-attention with a fused qkv projection and an optional relative position bias.

  Args:
    features: channels C, a multiple of `heads`.
    heads: number of heads.
    grid: (rows, columns) of the unit grid when a relative position bias is wanted, else None.

  Attributes:
    implementation: see `attention.attend`; `create_model` sets it.
  """

  implementation: str = 'xla'

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
    *,
    mask: np.ndarray | None = None,
  ) -> jax.Array:
    """Attends over all units of an example or window.

    Args:
      x: (B, N, C), or (B, W, N, C) of W windows.
      ids: (B, N) grid positions of the units when some are dropped; only the bias reads it.
      grid: (rows, columns) that the units come from when it is not the model's; the table of the
        bias is resized to it.
      mask: (W, N, N), added to the logits of a model with bias.

    Returns:
      The shape of `x`.
    """
    c = x.shape[-1]
    q, k, v = _split(self.qkv(x).reshape(*x.shape[:-1], 3, self.heads, c // self.heads))
    bias = None
    if self.grid is not None:
      grid = grid or self.grid
      table = resize.bias_table(self.relative_position_bias_table[...], self.grid, grid)
      bias = positions.relative_position_bias(table, grid, ids)
      if mask is not None:
        bias = bias + mask[:, None]
    q *= (c // self.heads) ** -0.5
    out = attention.attend(q, k, v, bias, implementation=self.implementation)
    return self.proj(out.swapaxes(-3, -2).reshape(x.shape))


class MlpBlock(nnx.Module):
  """Pre-norm residual MLP without attention: the block of HiViT's first two stages."""

  def __init__(self, features: int, *, mlp_ratio: float, rngs: nnx.Rngs, dtype: Any):
    self.norm2 = layer_norm(features, rngs=rngs, dtype=dtype)
    self.mlp = Mlp(features, int(features * mlp_ratio), rngs=rngs, dtype=dtype)

  def __call__(
    self, x: jax.Array, *, rate: jax.Array | float = 0.0, noise: jax.Array | None = None
  ) -> jax.Array:
    """x: (B, ..., C) -> the same shape; `rate` and `noise` (B, 2) are for `drop_path`."""
    return x + drop_path(self.mlp(self.norm2(x)), rate, None if noise is None else noise[:, 1])


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
    self.attn = Attention(features, heads, rngs=rngs, dtype=dtype, grid=grid, table_init=table_init)
    self.norm2 = layer_norm(features, rngs=rngs, dtype=dtype)
    self.mlp = Mlp(features, int(features * mlp_ratio), rngs=rngs, dtype=dtype)

  def __call__(
    self,
    x: jax.Array,
    ids: jax.Array | None = None,
    grid: tuple[int, int] | None = None,
    *,
    rate: jax.Array | float = 0.0,
    noise: jax.Array | None = None,
  ) -> jax.Array:
    """x: (B, N, C) -> the same shape.

    `ids` and `grid` are as for `Attention`; `rate` and `noise` (B, 2) are for `drop_path`.
    """
    noise1, noise2 = (None, None) if noise is None else (noise[:, 0], noise[:, 1])
    x = x + drop_path(self.attn(self.norm1(x), ids, grid), rate, noise1)
    return x + drop_path(self.mlp(self.norm2(x)), rate, noise2)


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

  Between blocks there is a barrier for XLA's CPU backend. Without it the gradient's residual sums
  are fused over all layers, and every layer computes those of the layers after it again.
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
    x, _ = body(cpu_barrier(x), (layer_params, rates[i], None if noise is None else noise[i]))
  return x
