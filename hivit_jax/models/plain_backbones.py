"""ViT and Swin as backbones of a segmenter, to compare HiViT with.

They follow the segmenters of MAE and BEiT (arXiv 2111.06377, 2106.08254) and of Swin (arXiv
2103.14030), but are not theirs: this ViT has no relative position bias and no LayerScale, and the
windows of this Swin have to divide its maps.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from hivit_jax.models.convolutions import BatchNorm, Upsample
from hivit_jax.models.encoder import FeatureInfo
from hivit_jax.models.swin import LAYER_NORM_EPS, SwinEncoder, SwinSettings
from hivit_jax.models.units import max_pool
from hivit_jax.models.vit import ViTEncoder, ViTSettings
from hivit_jax.ops.gelu import gelu
from hivit_jax.ops.modules import layer_norm


class ViTBackbone(ViTEncoder):
  """ViT whose maps, all of stride 16, are the outputs of four blocks: of 12, 4, 6, 8 and 12."""

  def __init__(self, settings: ViTSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    depth = settings.depth
    self.ends = (max(1, depth // 3), max(1, depth // 2), max(1, 2 * depth // 3), depth)

  def __call__(
    self, images: jax.Array, *, drop_path_noise: jax.Array | None = None
  ) -> tuple[jax.Array, ...]:
    """(B, H, W, channels) of this model's image size -> four times (B, H/16, W/16, C)."""
    x, maps, start = self._embed(images), [], 0
    for end in self.ends:
      if end > start:
        blocks = self.blocks[start:end]
        x = self._run(blocks, start, x, drop_path_noise, scan=self.settings.scan)
      maps.append(x[:, 1:].reshape(x.shape[0], *self.grid, -1))
      start = end
    return tuple(maps)

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Channels and strides of the maps as `Neck` gives them."""
    return tuple(FeatureInfo(i + 1, self.settings.embed_dim, 4 * 2**i) for i in range(4))


class SwinBackbone(SwinEncoder):
  """Swin whose maps are the outputs of its stages, each with a LayerNorm."""

  def __init__(self, settings: SwinSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    options = {'epsilon': LAYER_NORM_EPS, 'rngs': rngs, 'dtype': settings.dtype}
    self.norms = nnx.List(
      layer_norm(settings.channels_of(stage), **options)
      for stage in range(len(settings.depths) - 1)
    )

  def __call__(
    self, images: jax.Array, *, drop_path_noise: jax.Array | None = None
  ) -> tuple[jax.Array, ...]:
    """(B, H, W, channels) of this model's image size -> (B, h, w, c) of each stage."""
    *maps, last = self.stages(images, drop_path_noise)
    return (*(norm(x) for norm, x in zip(self.norms, maps, strict=True)), last)


class Neck(nnx.Module):
  """Brings four maps of stride 16 to strides 4, 8, 16 and 32, as MAE's and BEiT's segmenters do."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: Any):
    options = {'rngs': rngs, 'dtype': dtype}
    first, second = Upsample(channels, **options), Upsample(channels, **options)
    self.upsample_4x: Any = nnx.List([first, BatchNorm(channels), second])
    self.upsample_2x = nnx.List([Upsample(channels, **options)])

  def __call__(self, maps: Sequence[jax.Array], *, train: bool) -> tuple[jax.Array, ...]:
    """(B, h, w, C) four times -> the first times 4, times 2, as it is, max-pooled by 2."""
    first, norm, second = self.upsample_4x
    finest = second(gelu(norm(first(maps[0]), train=train)))
    return finest, self.upsample_2x[0](maps[1]), maps[2], max_pool(maps[3])
