"""Swin transformer (arXiv 2103.14030): windows that shift, four stages.

The names of parameters are those of the official code. Where the whole map fits into a window, the
window is the map and nothing is shifted.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import layers
from hivit_jax.models.classifier import Classifier, HeadSettings
from hivit_jax.models.encoder import Encoder, FeatureInfo, Settings
from hivit_jax.models.patches import PatchEmbed, PatchMerge
from hivit_jax.models.units import PATCH
from hivit_jax.models.windows import join_windows, split_windows
from hivit_jax.ops import initializers
from hivit_jax.ops.modules import layer_norm
from hivit_jax.ops.precision import widen

LAYER_NORM_EPS = 1e-5
_FORBIDDEN = -100.0  # added to the logits of pairs that the shift made neighbours

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinSettings(Settings):
  """Settings of Swin's encoder.

  Attributes:
    embed_dim: channels of the first stage; every merge doubles them.
    depths: blocks of each stage.
    num_heads: heads of each stage.
    window_size: patches along a window's side; one number, or one for each stage.
    mlp_ratio: hidden width of the MLPs, as a multiple of their channels.
    mlp_stages: number of stages, from the first, whose blocks have no attention.
    global_stages: number of stages, the last ones, with a single window: the (square) map.
  """

  embed_dim: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  window_size: int | tuple[int, ...] = 7
  mlp_ratio: float = 4.0
  mlp_stages: int = 0
  global_stages: int = 0

  def __post_init__(self):
    super().__post_init__()
    for key in ('depths', 'num_heads', 'window_size'):
      value = getattr(self, key)
      if isinstance(value, int) and key == 'window_size':
        continue
      if isinstance(value, int) or len(value) != len(self.depths):
        raise UserError(
          f'{key}={value}: expected one number for each stage of depths={self.depths}'
        )
    height, width = self.image_size
    if height % self.stride or width % self.stride or not min(self.image_size):
      raise UserError(f'image_size must be multiples of {self.stride} pixels, got {height}x{width}')
    if self.global_stages and height != width:
      raise UserError(f'stages with global attention take square images, not {height}x{width}')
    for stage in range(self.mlp_stages, len(self.depths)):
      (rows, columns), side = self.grid_of(stage), min(self.window_of(stage), *self.grid_of(stage))
      if rows % side or columns % side:
        raise UserError(
          f'windows of {side}x{side} do not cover a map of {rows}x{columns}: choose another '
          'image_size or window_size'
        )

  @property
  def stride(self) -> int:
    """Pixels from one cell of the last map to the next."""
    return PATCH * 2 ** (len(self.depths) - 1)

  @property
  def features(self) -> int:
    """Channels of the last map."""
    return self.channels_of(len(self.depths) - 1)

  def channels_of(self, stage: int) -> int:
    """Channels of a stage, which is counted from 0."""
    return self.embed_dim * 2**stage

  def grid_of(self, stage: int) -> Grid:
    """(rows, columns) of a stage's map."""
    height, width = self.image_size
    return height // PATCH >> stage, width // PATCH >> stage

  def window_of(self, stage: int) -> int:
    """Side of a stage's windows; larger than the map: the map is the window."""
    if stage >= len(self.depths) - self.global_stages:
      return self.grid_of(stage)[0]
    return self.window_size if isinstance(self.window_size, int) else self.window_size[stage]


@functools.cache
def shift_mask(grid: Grid, side: int, shift: int) -> np.ndarray:
  """(windows, side * side, side * side), for maps rolled by `shift`: 0 where both were near."""
  region = np.zeros(grid, np.int32)
  for axis, size in enumerate(grid):
    part = np.zeros(size, np.int32)
    part[size - side : size - shift] = 1
    part[size - shift :] = 2
    region = region * 3 + (part[:, None] if axis == 0 else part[None])
  windows = split_windows(region[None, ..., None], side)[0, :, :, 0]
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
    options = {'rngs': rngs, 'dtype': dtype}
    self.norm1 = layer_norm(features, epsilon=LAYER_NORM_EPS, **options)
    self.attn = layers.Attention(features, heads, grid=(self.window, self.window), **options)
    self.norm2 = layer_norm(features, epsilon=LAYER_NORM_EPS, **options)
    self.mlp = layers.Mlp(features, int(features * mlp_ratio), **options)

  def __call__(
    self, x: jax.Array, *, rate: jax.Array | float = 0.0, noise: jax.Array | None = None
  ) -> jax.Array:
    """x: (B, h, w, C) -> the same shape; `rate` and `noise` (B, 2) are for `drop_path`."""
    noise1, noise2 = (None, None) if noise is None else (noise[:, 0], noise[:, 1])
    x = x + layers.drop_path(self._attend(self.norm1(x)), rate, noise1)
    return x + layers.drop_path(self.mlp(self.norm2(x)), rate, noise2)

  def _attend(self, x: jax.Array) -> jax.Array:
    """Attention within windows, which stand `shift` cells further down and to the right."""
    if not self.shift:
      windows = self.attn(split_windows(x, self.window))  # (B, windows, side * side, C)
      return join_windows(windows, self.grid, self.window)
    x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
    mask = shift_mask(self.grid, self.window, self.shift)
    windows = self.attn(split_windows(x, self.window), mask=mask)
    x = join_windows(windows, self.grid, self.window)
    return jnp.roll(x, (self.shift, self.shift), axis=(1, 2))


class SwinMerge(PatchMerge):
  """Joins 2x2 neighbours of a map."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, h, w, c) -> (B, h / 2, w / 2, 2c)."""
    b, h, w, c = x.shape
    # (0,0), (1,0), (0,1), (1,1) as (row, column)
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)
    return super().__call__(x.reshape(b, h // 2, 2 * w, c))


class SwinStage(nnx.Module):
  """Blocks of one resolution, and the merge to the next."""

  def __init__(self, settings: SwinSettings, stage: int, *, rngs: nnx.Rngs):
    features = settings.channels_of(stage)
    options: dict[str, Any] = {'rngs': rngs, 'dtype': settings.dtype}

    def block(i: int) -> nnx.Module:
      if stage < settings.mlp_stages:
        return layers.MlpBlock(features, mlp_ratio=settings.mlp_ratio, **options)
      return SwinBlock(
        features,
        settings.num_heads[stage],
        grid=settings.grid_of(stage),
        window_size=settings.window_of(stage),
        shifted=i % 2 == 1,
        mlp_ratio=settings.mlp_ratio,
        **options,
      )

    self.blocks = nnx.List(block(i) for i in range(settings.depths[stage]))
    last = stage == len(settings.depths) - 1
    self.downsample = None if last else SwinMerge(features, epsilon=LAYER_NORM_EPS, **options)


def cut_patches(images: jax.Array) -> jax.Array:
  """(B, H, W, c) -> (B, H / 4, W / 4, 4 * 4 * c)."""
  b, h, w, c = images.shape
  x = images.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c).swapaxes(2, 3)
  return x.reshape(b, h // PATCH, w // PATCH, PATCH * PATCH * c)


class SwinEncoder(Encoder):
  """Patch embedding, stages, LayerNorm.

  Args:
    settings: see `SwinSettings`.
    rngs: `nnx.Rngs` with a `params` stream.
    masked: has a `mask_token` for patches that are not to be seen.
  """

  def __init__(self, settings: SwinSettings, *, rngs: nnx.Rngs, masked: bool = False):
    super().__init__(settings, sum(settings.depths))
    c, options = settings.embed_dim, {'rngs': rngs, 'dtype': settings.dtype}
    self.patch_embed = PatchEmbed(
      PATCH, settings.channels, c, norm=True, epsilon=LAYER_NORM_EPS, **options
    )
    if masked:
      self.mask_token = nnx.Param(initializers.normal(0.02)(rngs.params(), (1, 1, c)))
    self.layers = nnx.List(
      SwinStage(settings, stage, rngs=rngs) for stage in range(len(settings.depths))
    )
    self.norm = layer_norm(settings.features, epsilon=LAYER_NORM_EPS, **options)

  def stages(
    self,
    images: jax.Array,
    drop_path_noise: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """Maps of all stages, each before its merge, the last one normalised.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.
      mask: (B, H / 4, W / 4), 1 = the mask token takes the patch's place.

    Returns:
      (B, h, w, c) of each stage.

    Raises:
      UserError: images of another size, type or other channels.
    """
    self._check(images)
    x = self.patch_embed(cut_patches(images))  # (B, H / 4, W / 4, embed_dim)
    if mask is not None:
      # The token rounded last, so that its gradient is summed in float32.
      x = jnp.where(mask[..., None] > 0, self.mask_token[...], widen(x)).astype(x.dtype)
    maps, count = [], 0
    for stage in self.layers:
      for block in stage.blocks:  # one by one: every second is shifted
        x = self._run([block], count, x, drop_path_noise)
        count += 1
      maps.append(x)
      if stage.downsample is not None:
        x = stage.downsample(x)
    return (*maps[:-1], self.norm(x))

  def forward_features(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> jax.Array:
    """(B, h, w, C), the last map; UserError for `ids`: windows need their neighbours."""
    if ids is not None:
      raise UserError('Swin computes all patches and takes no ids')
    return self.stages(images, drop_path_noise)[-1]

  def pooled(self, images: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of the last map."""
    return self.forward_features(images, None, drop_path_noise).mean(axis=(1, 2))

  def unit_tokens(self, images: jax.Array) -> tuple[jax.Array, ...]:
    """See `Encoder`; a unit is a cell of the last map."""
    maps = self.stages(images)
    rows, columns = maps[-1].shape[1:3]
    return tuple(
      split_windows(x, x.shape[1] // rows).reshape(len(x), rows, columns, -1, x.shape[-1])
      for x in maps
    )

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Channels and strides of the maps of `stages`."""
    settings = self.settings
    return tuple(
      FeatureInfo(i + 1, settings.channels_of(i), PATCH * 2**i) for i in range(len(settings.depths))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinClassifierSettings(HeadSettings, SwinSettings):
  """Settings of Swin with a head."""


class Swin(SwinEncoder, Classifier):
  """Swin classifier: mean over the last map, Linear."""

  def __init__(self, settings: SwinClassifierSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    self._add_head(settings, settings.features, rngs=rngs)
