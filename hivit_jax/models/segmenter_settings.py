"""Settings of segmenters on each backbone."""

import dataclasses
from typing import Any

from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models.backbone import BackboneSettings, HiViTBackbone
from hivit_jax.models.encoder import Settings
from hivit_jax.models.hivit import HiViTSettings
from hivit_jax.models.swin import SwinSettings
from hivit_jax.models.swin_backbone import SwinBackbone
from hivit_jax.models.vit import ViTSettings
from hivit_jax.models.vit_pyramid import Neck, ViTBackbone


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsSettings(Settings):
  """Settings of a segmenter's heads.

  Attributes:
    num_classes: of a pixel.
    head_channels: of UPerNet; it takes most of the computation at the published 1024.
    auxiliary_channels: of the second head; 0: there is none.
    linear_levels: levels of the encoder, from 1, finest, to 4, that a linear classifier of pixels
      takes instead of UPerNet, which there is not then, nor a second head.
    dropout_rate: share of the channels that training drops before the classifiers.
  """

  num_classes: int = 150
  head_channels: int = 1024
  auxiliary_channels: int = 256
  linear_levels: tuple[int, ...] = ()
  dropout_rate: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    if len({*self.linear_levels} & {1, 2, 3, 4}) != len(self.linear_levels):
      raise UserError(f'linear_levels={self.linear_levels}: expected some of 1, 2, 3, 4, each once')
    if self.num_classes < 2:
      raise UserError(f'num_classes must be 2 or more, got {self.num_classes}')
    if self.head_channels < 1 or self.auxiliary_channels < 0:
      raise UserError(
        f'head_channels={self.head_channels}, auxiliary_channels={self.auxiliary_channels}: '
        'expected at least 1, and 0 or more'
      )
    if not 0 <= self.dropout_rate < 1:
      raise UserError(f'dropout_rate must be at least 0 and below 1, got {self.dropout_rate}')

  def _shared(self, settings: type[Settings]) -> dict[str, Any]:
    """What an encoder's settings have of these."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(settings)}

  def make_encoder(self, rngs: nnx.Rngs) -> Any:
    """What gives the maps, finest first."""
    raise NotImplementedError

  def make_neck(self, rngs: nnx.Rngs) -> Neck | None:
    """What UPerNet needs between the encoder and itself, if anything."""
    del rngs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterSettings(HeadsSettings, HiViTSettings):
  """Settings of HiViT with UPerNet.

  `image_size` is that of the crops: the bias tables are for it. Other sizes resize the tables.

  Attributes:
    position_image_size: (height, width) that the position embedding is for; it is resized to the
      crops in every forward pass, as the published segmenter does.
  """

  position_image_size: tuple[int, int] = (224, 224)

  @property
  def backbone(self) -> BackboneSettings:
    """Settings of the encoder."""
    shared = self._shared(HiViTSettings)
    shared['image_size'] = self.position_image_size
    return BackboneSettings(**shared, bias_image_size=self.image_size)

  def make_encoder(self, rngs: nnx.Rngs) -> HiViTBackbone:
    return HiViTBackbone(self.backbone, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTSegmenterSettings(HeadsSettings, ViTSettings):
  """Settings of ViT with UPerNet; all images are of `image_size`."""

  def make_encoder(self, rngs: nnx.Rngs) -> ViTBackbone:
    return ViTBackbone(ViTSettings(**self._shared(ViTSettings)), rngs=rngs)

  def make_neck(self, rngs: nnx.Rngs) -> Neck:
    return Neck(self.embed_dim, rngs=rngs, dtype=self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinSegmenterSettings(HeadsSettings, SwinSettings):
  """Settings of Swin with UPerNet; all images are of `image_size`, which windows have to divide."""

  def make_encoder(self, rngs: nnx.Rngs) -> SwinBackbone:
    return SwinBackbone(SwinSettings(**self._shared(SwinSettings)), rngs=rngs)
