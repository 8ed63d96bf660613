"""iTPN (arXiv 2211.12735): HiViT's encoder with a feature pyramid that is pretrained with it.

Classifiers of iTPN have no pyramid: they are `hivit_*` with `stem_blocks`. All parts of the pyramid
are local to a unit, so it needs the kept units only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import layers, positions, resize
from hivit_jax.models.encoder import FeatureInfo
from hivit_jax.models.hivit import HiViTEncoder, HiViTSettings
from hivit_jax.models.mae import MAESettings, MaskedAutoencoder
from hivit_jax.models.patches import Stem
from hivit_jax.models.units import (
  PATCH,
  max_pool,
  mean_pool,
  to_map,
  to_rows_and_columns,
  unit_grid,
)
from hivit_jax.ops.modules import LayerNorm, layer_norm, linear

_MLP_RATIO = 4.0  # of the pyramid's blocks
_DENSE_EPS = 1e-5  # of every LayerNorm in the published detectors and segmenters

Levels = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ITPNSettings(HiViTSettings):
  """Settings of iTPN's encoder with its pyramid.

  Attributes:
    fpn_dim: channels F of the pyramid.
    fpn_depth: MLP blocks before the two finer outputs, beside the last one that each output has.
  """

  rpe: bool = False
  fpn_dim: int = 256
  fpn_depth: int = 2


class Split(nnx.Module):
  """Turns each cell into 2x2: LayerNorm, Linear without bias."""

  def __init__(self, features: int, out_features: int, *, rngs: nnx.Rngs, dtype: Any):
    self.norm = layer_norm(features, rngs=rngs, dtype=dtype)
    self.reduction = linear(features, 4 * out_features, use_bias=False, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, K, cells, c) -> (B, K, 4 * cells, F), in merge order."""
    b, k, cells, _ = x.shape
    x = self.reduction(self.norm(x)).reshape(b, k, cells, 2, 2, -1)  # row, column
    return x.swapaxes(3, 4).reshape(b, k, 4 * cells, -1)


class ITPNEncoder(HiViTEncoder):
  """HiViT's encoder and a pyramid on the outputs of its three stages."""

  def __init__(self, settings: ITPNSettings, *, rngs: nnx.Rngs, position: jax.Array | None = None):
    super().__init__(settings, rngs=rngs, position=position)
    c, f, options = settings.embed_dim, settings.fpn_dim, {'rngs': rngs, 'dtype': settings.dtype}

    def blocks(count: int) -> nnx.List:
      block = lambda: layers.MlpBlock(f, mlp_ratio=_MLP_RATIO, **options)  # noqa: E731
      return nnx.List(block() for _ in range(count))

    self.align_dim_16tofpn = linear(c, f, **options) if f != c else None
    self.align_dim_16to8 = linear(c // 2, f, use_bias=False, **options)
    self.split_16to8 = Split(c, f, **options)
    self.block_16to8 = blocks(settings.fpn_depth)
    self.align_dim_8to4 = linear(c // 4, f, use_bias=False, **options)
    self.split_8to4 = Split(f, f, **options)
    self.block_8to4 = blocks(settings.fpn_depth)
    self.fpn_modules = blocks(3)

  def _taps(self, stem: Stem) -> tuple[jax.Array, jax.Array]:
    return stem.stage1, stem.stage2

  def pyramid(self, stage1: jax.Array, stage2: jax.Array, tokens: jax.Array) -> Levels:
    """The outputs of the stages -> those of the pyramid, coarse to fine.

    Args:
      stage1: (B, K, 16, C / 4), cells in merge order.
      stage2: (B, K, 4, C / 2).
      tokens: (B, K, C).

    Returns:
      (B, K, 1, F), (B, K, 4, F) and (B, K, 16, F), cells in merge order.
    """
    x = tokens[:, :, None]
    coarse = x if self.align_dim_16tofpn is None else self.align_dim_16tofpn(x)
    middle = self.split_16to8(x) + self.align_dim_16to8(stage2)
    for block in self.block_16to8:
      middle = block(middle)
    fine = self.split_8to4(middle) + self.align_dim_8to4(stage1)
    for block in self.block_8to4:
      fine = block(fine)
    coarse, middle, fine = (
      block(x) for block, x in zip(self.fpn_modules, (coarse, middle, fine), strict=True)
    )
    return coarse, middle, fine


@dataclasses.dataclass(frozen=True, kw_only=True)
class ITPNBackboneSettings(ITPNSettings):
  """Settings of iTPN as a backbone.

  Attributes:
    join_stages: as in the published segmenter: four levels, of which each of the first three is an
      output of the pyramid beside its stage's; else, as in the published detector, five levels of
      the pyramid alone.
  """

  join_stages: bool = False


class ITPNBackbone(ITPNEncoder):
  """iTPN as the backbone of a detector or a segmenter; images may have any multiple of 16 pixels.

  Its LayerNorms have the epsilon of the published dense models, which is not that of the others.
  """

  def __init__(self, settings: ITPNBackboneSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    self.set_attributes(LayerNorm, epsilon=_DENSE_EPS)

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Channels and strides of the levels of `features`."""
    c, f = self.settings.embed_dim, self.settings.fpn_dim
    own = (c // 4, c // 2, c, c) if self.settings.join_stages else (0,) * 5
    return tuple(FeatureInfo(i + 1, f + width, PATCH * 2**i) for i, width in enumerate(own))

  def features(
    self,
    images: jax.Array,
    levels: Sequence[int] | None = None,
    *,
    drop_path_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """Feature maps for dense tasks.

    Levels 1, 2 and 3, of strides 4, 8 and 16, come from the pyramid; what is coarser is pooled from
    level 3: by the mean of its cells, with `join_stages` by their maximum. The position embedding
    is resized to the images' grid.

    Args:
      images: (B, H, W, channels) normalised images of any size that is a multiple of 16.
      levels: which, in which order; None: all.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.

    Returns:
      For each of `levels` (B, h, w, C), see `feature_info`.

    Raises:
      UserError: a size or a level that there is not.
    """
    self._check(images, any_size=True)
    info = self.feature_info
    levels = tuple(range(1, len(info) + 1)) if levels is None else levels
    if not set(levels) <= {level for level, *_ in info}:
      raise UserError(f'levels must be some of 1 to {len(info)}, got {tuple(levels)}')
    coarsest = info[max(levels) - 1]
    if min(images.shape[1:3]) < coarsest.stride:
      height, width = images.shape[1:3]
      raise UserError(
        f'level {coarsest.level} has a stride of {coarsest.stride} pixels, the image only '
        f'{height}x{width}; leave out level {coarsest.level}'
      )
    grid = unit_grid((images.shape[1], images.shape[2]))
    stem, x = self._of_any_size(images, None, (), drop_path_noise)
    stages = stem.stage1, stem.stage2, x.reshape(x.shape[0], -1, x.shape[-1])
    maps = [to_map(level, grid) for level in reversed(self.pyramid(*stages))]  # fine to coarse
    if self.settings.join_stages:
      own = (to_map(stem.stage1, grid), to_map(stem.stage2, grid), x)
      maps = [jnp.concatenate(pair, axis=-1) for pair in zip(maps, own, strict=True)]
      maps.append(max_pool(maps[-1]))
    else:
      maps.append(mean_pool(maps[-1]))
      maps.append(mean_pool(maps[-1]))
    return tuple(maps[level - 1] for level in levels)

  def __call__(
    self,
    images: jax.Array,
    levels: Sequence[int] | None = None,
    *,
    drop_path_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """Feature maps, see `features`."""
    return self.features(images, levels, drop_path_noise=drop_path_noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ITPNMAESettings(MAESettings, ITPNSettings):
  """Settings of iTPN as a masked autoencoder.

  The authors' code compares numbers of tokens to see whether the position embedding has to be
  resized, so where units are removed it asks PyTorch to resize it to its own grid with an overhang
  of 0.1. PyTorch's CUDA kernel copies an input of the output's size, and that is what the published
  weights were trained with; its CPU kernel moves the samples, and copies only the gradient.

  Attributes:
    position_overhang: units, see `resize.resampled`; 0.1 computes what PyTorch does on a CPU.
  """

  position_overhang: float = 0.0


class ITPNMaskedAutoencoder(ITPNEncoder, MaskedAutoencoder):
  """MAE with iTPN: the decoder reads the three outputs of the pyramid.

  Each of them has a mask token where a unit is removed, and it is the same one.
  """

  mask_tokens = 3

  def __init__(self, settings: ITPNMAESettings, *, rngs: nnx.Rngs):
    position = positions.sincos_2d(settings.embed_dim, settings.grid)
    super().__init__(settings, rngs=rngs, position=position)
    if settings.decoder_embed_dim % 16:
      raise UserError(f'decoder_embed_dim={settings.decoder_embed_dim} is not a multiple of 16')
    self._add_decoder(settings, settings.fpn_dim, rngs=rngs)

  def _decoder_embed(self, width: int, features: int, **options: Any) -> Any:
    return nnx.List(
      nnx.List([layer_norm(width, **options), linear(width, features // cells, **options)])
      for cells in (1, 4, 16)
    )

  def _embed(self, latent: Levels) -> jax.Array:
    b, k, *_ = latent[0].shape
    embedded = []
    for (norm, dense), x in zip(self.decoder_embed, latent, strict=True):
      embedded.append(to_rows_and_columns(dense(norm(x))).reshape(b, k, -1))
    return embedded[0] + embedded[1] + embedded[2]

  def _position(self, some: bool) -> jax.Array:
    position, overhang = super()._position(some), self.settings.position_overhang
    if not some or not overhang:
      return position
    moved = resize.resampled(position, self.grid, self.grid, overhang)
    return position + jax.lax.stop_gradient(moved - position)

  def latent(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> Levels:
    """What the decoder gets, see `pyramid`; arguments as for `stages`."""
    return self.pyramid(*self.stages(images, ids, drop_path_noise))
