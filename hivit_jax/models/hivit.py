"""HiViT: a hierarchical vision transformer whose units meet only in the main stage.

Source: "HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling", arXiv 2205.14949.

An image is a grid of 16x16-pixel *units*. Each unit starts as 4x4 sub-patches of 4x4 pixels; two
stages of MLP blocks, each followed by a 2x2 merge, turn them into one token per unit. No unit sees
another before the main stage, so units can be dropped from the raw pixels.

The sub-patches of a unit are kept in an order in which both merges are reshapes and move no data:
see `units.unit_patches`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import classifier, layers, resize, windows
from hivit_jax.models.encoder import Encoder, FeatureInfo, TokenSettings
from hivit_jax.models.patches import PatchEmbed, PatchMerge, Stem
from hivit_jax.models.units import (
  PATCH,
  UNIT,
  max_pool,
  split_units,
  to_map,
  unit_grid,
  unit_patches,
  units_inside,
)
from hivit_jax.ops import initializers
from hivit_jax.ops.modules import layer_norm

OVERHANG = 0.1  # units: of the published dense models, see `resize.position_embedding`


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagesSettings(TokenSettings):
  """Settings of HiViT's encoder and of what was made of it.

  Attributes:
    depths: blocks of the three stages: MLP blocks, MLP blocks, transformer blocks.
    stem_mlp_ratio: hidden width of the MLP blocks, as a multiple of their channels.
    layer_scale: what scales of residual branches start as (LayerScale), those of all branches as in
      iTPN-CLIP, in Fast-iTPN those of the transformer blocks; 0 or None: there are none.
  """

  depths: tuple[int, int, int]
  stem_mlp_ratio: float = 3.0
  layer_scale: float | None = None

  def __post_init__(self):
    super().__post_init__()
    check_counts('depths', self.depths, 3)
    object.__setattr__(self, 'layer_scale', self.layer_scale or None)

  @property
  def stem(self) -> tuple[int, int]:
    """MLP blocks of the first two stages."""
    return self.depths[0], self.depths[1]

  @property
  def bias_grid(self) -> tuple[int, int] | None:
    """(rows, columns) of units that the bias tables are for, if there are any."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiViTSettings(StagesSettings):
  """Settings of HiViT's encoder.

  Attributes:
    depths: twice depths[0] MLP blocks, twice depths[1] MLP blocks, depths[2] transformer blocks.
    stem_blocks: MLP blocks of the first two stages when `depths` does not say it, as in iTPN with
      its odd numbers.
    rpe: learn a relative position bias in every transformer block.
  """

  stem_blocks: tuple[int, int] | None = None
  rpe: bool = True

  def __post_init__(self):
    super().__post_init__()
    check_counts('stem_blocks', self.stem_blocks, 2)

  @property
  def stem(self) -> tuple[int, int]:
    """See `StagesSettings`."""
    return self.stem_blocks or (2 * self.depths[0], 2 * self.depths[1])

  @property
  def bias_grid(self) -> tuple[int, int] | None:
    """(rows, columns) of units that the bias tables are for, if there are any."""
    return self.grid if self.rpe else None


def check_counts(key: str, value: Any, count: int) -> None:
  """UserError unless a setting is None or has `count` numbers."""
  if value is not None and (isinstance(value, int) or len(value) != count):
    raise UserError(f'{key}={value}: expected {count} numbers, one for each stage')


class HiViTEncoder(Encoder):
  """The encoder: everything up to the last transformer block.

  `blocks` is one flat list, as in the reference: MLP blocks, a merge, MLP blocks, a merge,
  transformer blocks.

  Args:
    settings: see `HiViTSettings`.
    rngs: `nnx.Rngs` with a `params` stream.
    position: (1, N, C), what the position embedding starts as; None: normal.
  """

  patch_norm = True  # after the patch embedding
  position_name = 'absolute_pos_embed'
  overhang = OVERHANG  # units: of `features`, see `resize.position_embedding`

  def __init__(
    self, settings: StagesSettings, *, rngs: nnx.Rngs, position: jax.Array | None = None
  ):
    self.stem_blocks = settings.stem
    super().__init__(settings, sum(self.stem_blocks) + settings.depths[2])
    self.grid = settings.grid
    width, options = settings.embed_dim, {'rngs': rngs, 'dtype': settings.dtype}
    norm = self.patch_norm
    self.patch_embed = PatchEmbed(PATCH, settings.channels, width // 4, norm=norm, **options)
    if position is None:
      shape = (1, self.grid[0] * self.grid[1], width)
      position = initializers.normal(0.02)(rngs.params(), shape)
    setattr(self, self.position_name, nnx.Param(position))
    blocks: list[nnx.Module] = []
    for count, channels in zip(self.stem_blocks, (width // 4, width // 2), strict=True):
      blocks += [self._stem_block(settings, channels, **options) for _ in range(count)]
      blocks.append(self._merge(channels, **options))
    blocks += [self._main_block(settings, **options) for _ in range(settings.depths[2])]
    self.blocks = nnx.List(blocks)

  def _stem_block(self, settings: Any, channels: int, **options: Any) -> nnx.Module:
    ratio, scale = settings.stem_mlp_ratio, settings.layer_scale
    return layers.MlpBlock(channels, mlp_ratio=ratio, layer_scale=scale, **options)

  def _merge(self, channels: int, **options: Any) -> nnx.Module:
    return PatchMerge(channels, **options)

  def _main_block(self, settings: Any, **options: Any) -> nnx.Module:
    return layers.Block(
      settings.embed_dim,
      settings.num_heads,
      mlp_ratio=settings.mlp_ratio,
      grid=settings.bias_grid,
      layer_scale=settings.layer_scale,
      **options,
    )

  def stages(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encodes all units, or only those in `ids`; the others are never computed.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      ids: (B, K) integer positions of the units to keep, in the row-major grid.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.

    Returns:
      Outputs of the three stages, each before its merge, K = N without ids: (B, K, 16, C/4) and
      (B, K, 4, C/2), cells in merge order (`units.to_rows_and_columns`), and (B, K, C).

    Raises:
      UserError: images of another size, type or other channels.
    """
    self._check(images)
    units, position = split_units(images), self._position(ids is not None)
    if ids is not None:
      units = self.ops.gather_units(units, ids)  # (B, K, 16, 16, channels)
      position = self.ops.gather_shared(position[0], ids)  # (B, K, C)
    stem = self._stem(units, drop_path_noise)
    x = layers.add_parameter(stem.tokens, position)
    first = sum(self.stem_blocks)
    scan = self.settings.scan
    x = self._run(self.blocks[first + 2 :], first, x, drop_path_noise, ids, self.grid, scan=scan)
    return stem.stage1, stem.stage2, x

  def _position(self, some: bool) -> jax.Array:
    """(1, N, C) position embedding, of which only `some` units are kept or all."""
    del some
    return getattr(self, self.position_name)[...]

  def _stem(self, units: jax.Array, drop_path_noise: jax.Array | None) -> Stem:
    first, second = self.stem_blocks
    half = first // 2
    merge1, merge2 = self.blocks[first], self.blocks[first + 1 + second]
    x = self.patch_embed(unit_patches(units.astype(self.settings.dtype)))
    middle = self._run(self.blocks[:half], 0, x, drop_path_noise)
    stage1 = self._run(self.blocks[half:first], half, middle, drop_path_noise)
    merged = merge1(stage1)
    stage2 = self._run(self.blocks[first + 1 : first + 1 + second], first, merged, drop_path_noise)
    return Stem(middle, stage1, merged, stage2, merge2(stage2)[:, :, 0])

  def forward_features(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> jax.Array:
    """(B, K, C) tokens after the last block; arguments as for `stages`."""
    return self.stages(images, ids, drop_path_noise)[-1]

  def pooled(self, images: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of all tokens."""
    return self.forward_features(images, None, drop_path_noise).mean(axis=1)

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Channels and strides of the levels of `features`."""
    width = self.settings.embed_dim
    channels = (width // 4, width // 2, width, width)
    return tuple(FeatureInfo(i + 1, c, PATCH * 2**i) for i, c in enumerate(channels))

  def features(
    self,
    images: jax.Array,
    levels: Sequence[int] = (1, 2, 3, 4),
    *,
    window_size: int | None = None,
    global_blocks: Sequence[int] = (),
    own: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """Feature maps of strides 4, 8, 16 and 32 for dense tasks.

    Level 1 is taken in the middle of the first stage and level 2 right after the first merge, as in
    the published detectors; level 3 after the last block; level 4 is level 3, max-pooled 2x2 (an
    odd last row or column is dropped). Position parameters are resized to the images' grid.

    Args:
      images: (B, H, W, channels) normalised images of any size that is a multiple of 16.
      levels: which, in which order.
      window_size: side of the windows, in units, within which the transformer blocks attend; None:
        they attend globally.
      global_blocks: transformer blocks, counted from 0, that attend globally nevertheless.
      own: (B, 2) rows and columns of units, the upper left ones, of images that are smaller than
        their canvas. Their features are those of the images alone; outside they mean nothing.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.

    Returns:
      For each of `levels` (B, h, w, C), see `feature_info`.

    Raises:
      UserError: a size, level or block that does not exist, or windows together with relative
        position bias.
    """
    self._check(images, any_size=True)
    grid = unit_grid((images.shape[1], images.shape[2]))
    self._check_features(levels, grid, window_size, global_blocks)
    stem, x = self._of_any_size(images, window_size, global_blocks, drop_path_noise, own)
    maps = {level: to_map(tap, grid) for level, tap in enumerate(self._taps(stem), 1)} | {3: x}
    maps[4] = max_pool(x)
    return tuple(maps[level] for level in levels)

  def _of_any_size(
    self,
    images: jax.Array,
    window_size: int | None,
    global_blocks: Sequence[int],
    drop_path_noise: jax.Array | None,
    own: jax.Array | None = None,
  ) -> tuple[Stem, jax.Array]:
    """The first two stages and the map (B, rows, columns, C) of the last; see `features`."""
    grid = unit_grid((images.shape[1], images.shape[2]))
    stem = self._stem(split_units(images), drop_path_noise)
    embedding, over = getattr(self, self.position_name)[...], self.overhang
    if own is None:
      position, inside = resize.position_embedding(embedding, self.grid, grid, overhang=over), None
    else:
      position = resize.own_position_embeddings(embedding, self.grid, grid, own, overhang=over)
      inside = units_inside(own, grid)
    x = layers.add_parameter(stem.tokens, position)
    x = x.reshape(len(x), *grid, -1)  # (B, rows, columns, C)
    return stem, self._dense_blocks(x, window_size, global_blocks, inside, drop_path_noise)

  def _taps(self, stem: Stem) -> tuple[jax.Array, jax.Array]:
    """Levels 1 and 2 of `features`, cells in merge order."""
    return stem.middle, stem.merged

  def _dense_blocks(self, x, window_size, global_blocks, inside, drop_path_noise) -> jax.Array:
    """The transformer blocks on a map (B, rows, columns, C), of which `inside` is the image's."""
    grid = x.shape[1], x.shape[2]
    first, depth, scan = sum(self.stem_blocks), self.settings.depths[2], self.settings.scan
    keys = None if inside is None else inside.reshape(len(x), -1)  # (B, N)
    # What a block makes of the outside must not come into the windows of the next.
    alone = inside is not None and window_size is not None

    def kind(i: int) -> tuple[bool, int]:
      everywhere = window_size is None or i in global_blocks
      return everywhere, i if alone and not everywhere else -1

    for (everywhere, _), run in itertools.groupby(range(depth), key=kind):
      start, *rest = (first + i for i in run)
      blocks = self.blocks[start + 2 : start + 3 + len(rest)]  # two merges are before them
      if everywhere or window_size is None:
        tokens = x.reshape(len(x), -1, x.shape[-1])  # (B, N, C)
        where = (None, grid) if keys is None else (None, grid, keys)
        tokens = self._run(blocks, start, tokens, drop_path_noise, *where, scan=scan)
        x = tokens.reshape(x.shape)
      else:
        x = x if inside is None else jnp.where(inside[..., None], x, 0)
        cut = windows.split_windows(x, window_size)  # (B, windows, side * side, C)
        cut = self._run(blocks, start, cut, drop_path_noise, None, grid, scan=scan)
        x = windows.join_windows(cut, grid, window_size)
    return x

  def _check_features(self, levels, grid, window_size, global_blocks) -> None:
    if not set(levels) <= {1, 2, 3, 4}:
      raise UserError(f'levels must be some of 1, 2, 3, 4, got {tuple(levels)}')
    if 4 in levels and min(grid) < 2:
      raise UserError(
        f'level 4 has a stride of 32 pixels, the image only {UNIT * grid[0]}x{UNIT * grid[1]}; '
        'leave out level 4'
      )
    if window_size is not None:
      biased = bool(self.settings.bias_grid)
      windows.check(window_size, global_blocks, self.settings.depths[2], biased=biased)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiViTClassifierSettings(classifier.HeadSettings, HiViTSettings):
  """Settings of HiViT with a head."""


class HiViT(HiViTEncoder, classifier.Classifier):
  """HiViT classifier: encoder, mean over the tokens, LayerNorm, Linear."""

  def __init__(self, settings: HiViTClassifierSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    self.fc_norm = layer_norm(settings.embed_dim, rngs=rngs, dtype=settings.dtype)
    self._add_head(settings, settings.embed_dim, rngs=rngs)
