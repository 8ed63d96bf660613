"""HiViT as the backbone of a detector or a segmenter."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from hivit_jax.models.encoder import Encoder, FeatureInfo, Settings
from hivit_jax.models.hivit import HiViTEncoder, HiViTSettings
from hivit_jax.models.units import unit_grid
from hivit_jax.ops.modules import layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSettings(Settings):
  """Settings of a backbone in addition to its encoder's.

  Attributes:
    window_size, global_blocks: see `HiViTEncoder.features`.
    level_norms: LayerNorm on every level.
  """

  window_size: int | None = None
  global_blocks: tuple[int, ...] = ()
  level_norms: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneSettings(DenseSettings, HiViTSettings):
  """Settings of HiViT as a backbone.

  The published detector (COCO) has `window_size=14, global_blocks=(4, 9, 14, 19),
  level_norms=True`; the published segmenter (ADE20K) has `rpe=True` with its tables made for the
  crops of the task, `bias_image_size=(640, 640)`.

  Attributes:
    bias_image_size: (height, width) that the bias tables are for when it is not `image_size`.
  """

  rpe: bool = False
  bias_image_size: tuple[int, int] | None = None

  @property
  def bias_grid(self) -> tuple[int, int] | None:
    """See `HiViTSettings`."""
    return unit_grid(self.bias_image_size or self.image_size) if self.rpe else None


class _MaxPool(nnx.Module):
  """Has no parameters; in the reference the fourth norm is the second part of a sequence."""


class Backbone(Encoder):
  """An encoder whose output are the feature maps of strides 4, 8, 16 and 32.

  Images may have any size that is a multiple of 16; `image_size` is that of the position embedding.
  """

  features: Callable[..., tuple[jax.Array, ...]]
  feature_info: Sequence[FeatureInfo]

  def _add_level_norms(self, settings: DenseSettings, *, rngs: nnx.Rngs) -> None:
    if settings.level_norms:
      self.fpn1, self.fpn2, self.fpn3, last = (
        layer_norm(info.channels, rngs=rngs, dtype=settings.dtype) for info in self.feature_info
      )
      self.fpn4 = nnx.List([_MaxPool(), last])

  def __call__(
    self,
    images: jax.Array,
    levels: Sequence[int] = (1, 2, 3, 4),
    *,
    own: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """Feature maps, see `HiViTEncoder.features`, with this model's windows and norms."""
    maps = self.features(
      images,
      levels,
      window_size=self.settings.window_size,
      global_blocks=self.settings.global_blocks,
      own=own,
      drop_path_noise=drop_path_noise,
    )
    if not self.settings.level_norms:
      return maps
    norms = {1: self.fpn1, 2: self.fpn2, 3: self.fpn3, 4: self.fpn4[1]}
    return tuple(norms[level](x) for level, x in zip(levels, maps, strict=True))


class HiViTBackbone(HiViTEncoder, Backbone):
  """HiViT as a backbone."""

  def __init__(self, settings: BackboneSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    self._add_level_norms(settings, rngs=rngs)
