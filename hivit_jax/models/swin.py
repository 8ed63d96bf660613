"""Swin transformer (arXiv 2103.14030): windows that shift, four stages.

The names of parameters are those of the official code. Where the whole map fits into a window, the
window is the map and nothing is shifted.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import layers
from hivit_jax.models.classifier import Classifier
from hivit_jax.ops.modules import layer_norm, linear
from hivit_jax.ops.precision import widen

PATCH = 4  # pixels
LAYER_NORM_EPS = 1e-5
_FORBIDDEN = -100.0  # added to the logits of pairs that the shift made neighbours

Grid = tuple[int, int]


def _norm(features: int, *, rngs: nnx.Rngs, dtype: Any) -> nnx.LayerNorm:
  return layer_norm(features, rngs=rngs, dtype=dtype, epsilon=LAYER_NORM_EPS)


def to_windows(x: Any, side: int) -> Any:
  """(B, h, w, C) -> (B, windows, side * side, C); `side` divides h and w."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // side, side, w // side, side, c).swapaxes(2, 3)
  return x.reshape(b, -1, side * side, c)


def from_windows(x: jax.Array, grid: Grid) -> jax.Array:
  """Inverse of `to_windows`: (B, windows, side * side, C) -> (B, h, w, C)."""
  b, _, area, c = x.shape
  side = int(area**0.5)
  h, w = grid
  x = x.reshape(b, h // side, w // side, side, side, c).swapaxes(2, 3)
  return x.reshape(b, h, w, c)


@functools.cache
def shift_mask(grid: Grid, side: int, shift: int) -> np.ndarray:
  """(windows, side * side, side * side), for maps rolled by `shift`: 0 where both were near."""
  region = np.zeros(grid, np.int32)
  for axis, size in enumerate(grid):
    part = np.zeros(size, np.int32)
    part[size - side : size - shift] = 1
    part[size - shift :] = 2
    region = region * 3 + (part[:, None] if axis == 0 else part[None])
  windows = np.asarray(to_windows(region[None, ..., None], side))[0, :, :, 0]
  other = windows[:, :, None] != windows[:, None]
  return np.where(other, np.float32(_FORBIDDEN), np.float32(0))


class SwinBlock(nnx.Module):
  """Pre-norm block: attention within windows, and MLP, each residual."""

  def __init__(
    self,
    features: int,
    heads: int,
    *,
    grid: Grid,
    window_size: int,
    shifted: bool,
    mlp_ratio: float,
    rngs: nnx.Rngs,
    dtype: Any,
  ):
    self.grid = grid
    self.window = min(window_size, *grid)
    self.shift = window_size // 2 if shifted and min(grid) > window_size else 0
    if any(side % self.window for side in grid):
      raise UserError(
        f'windows of {self.window}x{self.window} do not cover a map of {grid[0]}x{grid[1]}: '
        'choose another image_size or window_size'
      )
    options = {'rngs': rngs, 'dtype': dtype}
    self.norm1 = _norm(features, **options)
    self.attn = layers.Attention(features, heads, grid=(self.window, self.window), **options)
    self.norm2 = _norm(features, **options)
    self.mlp = layers.Mlp(features, int(features * mlp_ratio), **options)

  def __call__(
    self, x: jax.Array, *, rate: jax.Array | float = 0.0, noise: jax.Array | None = None
  ) -> jax.Array:
    """x: (B, h, w, C) -> the same shape; `rate` and `noise` (B, 2) are for `drop_path`."""
    noise1, noise2 = (None, None) if noise is None else (noise[:, 0], noise[:, 1])
    y, mask = self.norm1(x), None
    if self.shift:
      y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))
      mask = shift_mask(self.grid, self.window, self.shift)
    y = from_windows(self.attn(to_windows(y, self.window), mask=mask), self.grid)
    if self.shift:
      y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))
    x = x + layers.drop_path(y, rate, noise1)
    return x + layers.drop_path(self.mlp(self.norm2(x)), rate, noise2)


class SwinMerge(nnx.Module):
  """Joins 2x2 neighbours: concatenation, LayerNorm, Linear(4c -> 2c) without bias."""

  def __init__(self, features: int, *, rngs: nnx.Rngs, dtype: Any):
    self.norm = _norm(4 * features, rngs=rngs, dtype=dtype)
    self.reduction = linear(4 * features, 2 * features, use_bias=False, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, h, w, c) -> (B, h / 2, w / 2, 2c)."""
    b, h, w, c = x.shape
    # (0,0), (1,0), (0,1), (1,1) as (row, column)
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)
    return self.reduction(self.norm(x.reshape(b, h // 2, w // 2, 4 * c)))


class SwinStage(nnx.Module):
  """Blocks of one resolution, and the merge to the next."""

  def __init__(
    self,
    features: int,
    depth: int,
    heads: int,
    *,
    grid: Grid,
    window_size: int,
    mlp_ratio: float,
    attention: bool,
    merge: bool,
    rngs: nnx.Rngs,
    dtype: Any,
  ):
    options: dict[str, Any] = {'mlp_ratio': mlp_ratio, 'rngs': rngs, 'dtype': dtype}
    self.blocks = nnx.List(
      SwinBlock(features, heads, grid=grid, window_size=window_size, shifted=i % 2 == 1, **options)
      if attention
      else layers.MlpBlock(features, **options)
      for i in range(depth)
    )
    self.downsample = SwinMerge(features, rngs=rngs, dtype=dtype) if merge else None


class SwinPatchEmbed(nnx.Module):
  """4x4 convolution of stride 4, then LayerNorm."""

  def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs, dtype: Any):
    self.proj = layers.patch_conv(channels, features, PATCH, rngs=rngs, dtype=dtype)
    self.norm = _norm(features, rngs=rngs, dtype=dtype)

  def __call__(self, images: jax.Array) -> jax.Array:
    """(B, H, W, channels) -> (B, H / 4, W / 4, features)."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c).swapaxes(2, 3)
    x = x.reshape(b, h // PATCH, w // PATCH, PATCH * PATCH * c)
    return self.norm(self.proj(x))


class SwinEncoder(layers.StochasticDepth, nnx.Module):
  """Patch embedding, stages, LayerNorm.

  Args:
    image_size: (height, width) in pixels.
    channels: input channels.
    embed_dim: channels of the first stage; every merge doubles them.
    depths: blocks of each stage.
    num_heads: heads of each stage.
    window_size: patches along a window's side; one number, or one for each stage.
    mlp_ratio: hidden width of the MLPs, as a multiple of their channels.
    mlp_stages: so many stages, from the first, have blocks without attention.
    global_stages: so many stages, the last ones, have one window, which is the (square) map.
    drop_path_rate: maximum; rates rise linearly from 0 over all blocks.
    remat: recompute activations in the backward pass.
    scan: not possible, the blocks of a stage differ.
    masked: has a `mask_token` for patches that are not to be seen.
    dtype: of the computation; parameters are float32.
    rngs: `nnx.Rngs` with a `params` stream.
  """

  def __init__(
    self,
    *,
    image_size: tuple[int, int],
    channels: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int | Sequence[int],
    mlp_ratio: float,
    drop_path_rate: float,
    remat: bool,
    scan: bool,
    dtype: Any,
    rngs: nnx.Rngs,
    mlp_stages: int = 0,
    global_stages: int = 0,
    masked: bool = False,
  ):
    for key, value in (('depths', depths), ('num_heads', num_heads)):
      if isinstance(value, int) or len(value) != len(depths):
        raise UserError(f'{key}={value}: expected one number for each stage of depths={depths}')
    if scan:
      raise UserError('Swin takes no scan=True: every second block is shifted')
    stride = PATCH * 2 ** (len(depths) - 1)
    if any(side % stride for side in image_size):
      raise UserError(
        f'image_size must be multiples of {stride} pixels, got {image_size[0]}x{image_size[1]}'
      )
    self.image_size = tuple(image_size)
    self.channels = channels
    self.embed_dim = embed_dim
    self.depths = tuple(depths)
    self.window_size = window_size
    self.stride = stride
    self.features = embed_dim * 2 ** (len(depths) - 1)
    self.remat = remat
    options = {'rngs': rngs, 'dtype': dtype}
    self.patch_embed = SwinPatchEmbed(channels, embed_dim, **options)
    if masked:
      self.mask_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, embed_dim)))
    height, width = (side // PATCH for side in image_size)
    if global_stages and height != width:
      raise UserError(
        f'stages with global attention take square images, not {image_size[0]}x{image_size[1]}'
      )
    local_stages = len(depths) - global_stages
    windows = (window_size,) * len(depths) if isinstance(window_size, int) else window_size
    self.layers = nnx.List(
      SwinStage(
        embed_dim * 2**i,
        depth,
        heads,
        grid=(height >> i, width >> i),
        window_size=window if i < local_stages else height >> i,
        mlp_ratio=mlp_ratio,
        attention=i >= mlp_stages,
        merge=i < len(depths) - 1,
        **options,
      )
      for i, (depth, heads, window) in enumerate(zip(depths, num_heads, windows, strict=True))
    )
    self.norm = _norm(self.features, **options)
    self.drop_path_rates = layers.rising_rates(drop_path_rate, sum(depths))

  def stages(
    self,
    images: jax.Array,
    *,
    mask: jax.Array | None = None,
    noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """Maps of all stages, each before its merge, the last one normalised.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      mask: (B, H / 4, W / 4), 1 = the mask token takes the patch's place.
      noise: from `drop_path_noise`; None (evaluation) switches drop path off.

    Returns:
      (B, h, w, c) of each stage.

    Raises:
      UserError: images of another size or other channels.
    """
    if images.ndim != 4 or images.shape[1:] != (*self.image_size, self.channels):
      height, width = self.image_size
      raise UserError(
        f'this model takes images (B, {height}, {width}, {self.channels}), got {images.shape}; '
        'image_size= of create_model sets it'
      )
    x = self.patch_embed(images)
    if mask is not None:
      # The token rounded last, so that its gradient is summed in float32.
      x = jnp.where(mask[..., None] > 0, self.mask_token[...], widen(x)).astype(x.dtype)
    rates = self.drop_path_rates
    noise = None if noise is None else jnp.moveaxis(noise, 1, 0)  # (blocks, B, 2)
    maps = []
    start = 0
    for stage in self.layers:
      for i, block in enumerate(stage.blocks, start):  # one by one: every second is shifted
        x = layers.apply_blocks(
          [block],
          x,
          rates=rates[i : i + 1],
          noise=None if noise is None else noise[i : i + 1],
          remat=self.remat,
          scan=False,
        )
      start += len(stage.blocks)
      maps.append(x)
      if stage.downsample is not None:
        x = stage.downsample(x)
    return (*maps[:-1], self.norm(x))


class Swin(SwinEncoder, Classifier):
  """Swin classifier: mean over the last map, Linear.

  Args:
    num_classes, head_std, head_batch_norm: see `classifier.Classifier`.
    Others as for `SwinEncoder`.
  """

  def __init__(
    self,
    *,
    image_size: tuple[int, int] = (224, 224),
    channels: int = 3,
    num_classes: int = 1000,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int | Sequence[int] = 7,
    mlp_ratio: float = 4.0,
    mlp_stages: int = 0,
    global_stages: int = 0,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    scan: bool = False,
    head_std: float = 0.02,
    head_batch_norm: bool = False,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      image_size=image_size,
      channels=channels,
      embed_dim=embed_dim,
      depths=depths,
      num_heads=num_heads,
      window_size=window_size,
      mlp_ratio=mlp_ratio,
      mlp_stages=mlp_stages,
      global_stages=global_stages,
      drop_path_rate=drop_path_rate,
      remat=remat,
      scan=scan,
      dtype=dtype,
      rngs=rngs,
    )
    self._add_head(
      self.features, num_classes, std=head_std, batch_norm=head_batch_norm, rngs=rngs, dtype=dtype
    )

  def pooled(self, images: jax.Array, *, noise: jax.Array | None = None) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of the last map."""
    return self.stages(images, noise=noise)[-1].mean(axis=(1, 2))
