"""ViT as the backbone of a detector: one map, made finer and coarser (arXiv 2203.16527)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from hivit_jax.models import layers, resize, windows
from hivit_jax.models.backbone import Backbone, DenseSettings
from hivit_jax.models.convolutions import Upsample
from hivit_jax.models.encoder import FeatureInfo
from hivit_jax.models.units import max_pool, split_units, unit_grid, units_inside
from hivit_jax.models.vit import ViTEncoder, ViTSettings
from hivit_jax.ops.gelu import gelu
from hivit_jax.ops.modules import layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTDetBackboneSettings(DenseSettings, ViTSettings):
  """Settings of ViT as a backbone; ViTDet-B has windows of 14 and global blocks 2, 5, 8, 11."""

  def __post_init__(self):
    super().__post_init__()
    if self.window_size is not None:
      windows.check(self.window_size, self.global_blocks, self.depth, biased=False)


class ViTDetBackbone(ViTEncoder, Backbone):
  """ViT as a backbone, without the relative positions that ViTDet adds when it finetunes.

  The class token is there for `forward_features`; maps are made without it.
  """

  def __init__(self, settings: ViTDetBackboneSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    c, options = settings.embed_dim, {'rngs': rngs, 'dtype': settings.dtype}

    self.stride8 = Upsample(c, c // 2, **options)
    norm = layer_norm(c // 2, **options)
    last = Upsample(c // 2, c // 4, **options)
    self.stride4 = nnx.List([Upsample(c, c // 2, **options), norm, last])
    self._add_level_norms(settings, rngs=rngs)

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Channels and strides of the levels of `features`."""
    c = self.settings.embed_dim
    return tuple(FeatureInfo(i + 1, n, 4 * 2**i) for i, n in enumerate((c // 4, c // 2, c, c)))

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
    """Feature maps of strides 4, 8, 16 and 32; see `HiViTEncoder.features`."""
    self._check(images, any_size=True)
    grid = unit_grid((images.shape[1], images.shape[2]))
    units = split_units(images)
    embedding = self.pos_embed[...][:, self.class_tokens :]
    position = resize.own_position_embeddings(embedding, self.grid, grid, own)
    x = self.patch_embed(units.reshape(*units.shape[:2], -1))
    x = layers.add_parameter(x, position).reshape(x.shape[0], *grid, -1)  # (B, rows, columns, C)

    def run(first: int, count: int, tokens: jax.Array, *where: Any) -> jax.Array:
      blocks = self.blocks[first : first + count]
      return self._run(blocks, first, tokens, drop_path_noise, *where, scan=self.settings.scan)

    inside = None if own is None else units_inside(own, grid)
    x = windows.run_blocks(run, x, self.settings.depth, window_size, global_blocks, inside)
    return tuple(self._level(x, level) for level in levels)

  def _level(self, x: jax.Array, level: int) -> jax.Array:
    if level == 1:
      first, norm, second = self.stride4
      return second(gelu(norm(first(x))))
    return {2: self.stride8, 3: lambda x: x, 4: max_pool}[level](x)
