"""ViT with four maps and their pyramid, for a segmenter, to compare HiViT with.

It follows the segmenters of MAE and BEiT (arXiv 2111.06377, 2106.08254) without their relative
position bias and LayerScale.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from hivit_jax.models.convolutions import BatchNorm, Upsample
from hivit_jax.models.encoder import FeatureInfo
from hivit_jax.models.units import UNIT, max_pool
from hivit_jax.models.vit import ViTEncoder, ViTSettings
from hivit_jax.ops.gelu import gelu


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
    x, maps, start = self._first_tokens(images), [], 0
    for end in self.ends:
      if end > start:
        blocks = self.blocks[start:end]
        x = self._run(blocks, start, x, drop_path_noise, scan=self.settings.scan)
      maps.append(x[:, 1:].reshape(x.shape[0], *self.grid, -1))
      start = end
    return tuple(maps)

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Channels and strides of the maps."""
    return tuple(FeatureInfo(i + 1, self.settings.embed_dim, UNIT) for i in range(4))


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
