"""Patch embedding, a convolution whose stride is its size, and merging."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from hivit_jax.models import layers
from hivit_jax.ops import initializers
from hivit_jax.ops.modules import LAYER_NORM_EPS, PatchConv, layer_norm, linear


def convolution(
  side: int,
  channels: int,
  features: int,
  *,
  rngs: nnx.Rngs,
  dtype: Any,
  kernel_bound: float | None = None,
) -> PatchConv:
  """A convolution of (side, side) pixels whose stride is its size.

  Args:
    side: pixels.
    channels, features: of input and output.
    rngs: `nnx.Rngs` with a `params` stream.
    dtype: of the computation.
    kernel_bound: the kernel is uniform within it; None: PyTorch's default, as the bias.
  """
  init = layers.torch_conv_init(side * side * channels)
  return PatchConv(
    channels,
    features,
    (side, side),
    strides=side,
    padding='VALID',
    kernel_init=init if kernel_bound is None else initializers.uniform(kernel_bound),
    bias_init=init,
    dtype=dtype,
    rngs=rngs,
  )


class PatchEmbed(nnx.Module):
  """Convolution of stride `side` and, if `norm`, a LayerNorm; see `convolution`."""

  def __init__(
    self,
    side: int,
    channels: int,
    features: int,
    *,
    norm: bool,
    rngs: nnx.Rngs,
    dtype: Any,
    epsilon: float = LAYER_NORM_EPS,
    kernel_bound: float | None = None,
  ):
    options = {'rngs': rngs, 'dtype': dtype}
    self.proj = convolution(side, channels, features, kernel_bound=kernel_bound, **options)
    self.norm = layer_norm(features, epsilon=epsilon, **options) if norm else None

  def __call__(self, patches: jax.Array) -> jax.Array:
    """(..., side * side * channels), in (row, column, channel) order -> (..., features)."""
    x = self.proj(patches)
    return x if self.norm is None else self.norm(x)


class PatchMerge(nnx.Module):
  """Joins 2x2 neighbours: concatenation, LayerNorm, Linear(4c -> 2c) without bias."""

  def __init__(self, features: int, *, rngs: nnx.Rngs, dtype: Any, epsilon: float = LAYER_NORM_EPS):
    self.norm = layer_norm(4 * features, rngs=rngs, dtype=dtype, epsilon=epsilon)
    self.reduction = linear(4 * features, 2 * features, use_bias=False, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., cells, c), neighbours in sequence -> (..., cells / 4, 2c)."""
    *leading, cells, c = x.shape
    return self.reduction(self.norm(x.reshape(*leading, cells // 4, 4 * c)))


class Stem(NamedTuple):
  """Outputs of the two stages of MLP blocks, cells in merge order."""

  middle: jax.Array  # (B, K, 16, C / 4), in the middle of the first stage
  stage1: jax.Array  # (B, K, 16, C / 4)
  merged: jax.Array  # (B, K, 4, C / 2), stage1 after its merge
  stage2: jax.Array  # (B, K, 4, C / 2)
  tokens: jax.Array  # (B, K, C), stage2 after its merge
