"""Settings of Mask R-CNN on each backbone."""

import dataclasses
from typing import Any, ClassVar

from hivit_jax.detection import anchors
from hivit_jax.errors import UserError
from hivit_jax.models.backbone import BackboneSettings
from hivit_jax.models.encoder import Settings
from hivit_jax.models.hivit import HiViTSettings
from hivit_jax.models.swin import SwinSettings
from hivit_jax.models.vit import ViTSettings
from hivit_jax.models.vit_backbone import ViTDetBackboneSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorSettings(Settings):
  """Settings of Mask R-CNN in addition to its encoder's; the defaults are the published ones.

  Attributes:
    num_classes: of objects, without the background.
    neck_channels: of the pyramid and the heads' convolutions.
    hidden: width of the box head's layer between.
    cascade: three box heads, each on the boxes of the one before, see `mask_rcnn.STAGES`.
    anchor_scale: side of a level's square anchor, in the level's strides.
    nms_pre: proposals of a level before suppression: (in training, in testing).
    proposals: of an image at most.
    detections: of an image at most.
    candidates: pairs of RoI and class that the last suppression sees at most.
    score_threshold: which a detection must exceed.
  """

  num_classes: int = 80
  neck_channels: int = 256
  hidden: int = 1024
  cascade: bool = False
  anchor_scale: float = anchors.SCALE
  nms_pre: tuple[int, int] = (2000, 1000)
  proposals: int = 1000
  detections: int = 100
  candidates: int = 4096
  score_threshold: float = 0.05

  backbone_settings: ClassVar[type[Settings]]

  def __post_init__(self):
    super().__post_init__()
    if self.num_classes < 1:
      raise UserError(f'num_classes must be at least 1, got {self.num_classes}')
    if self.anchor_scale <= 0:
      raise UserError(f'anchor_scale must be more than 0, got {self.anchor_scale}')
    least = min(*self.nms_pre, self.proposals, self.detections, self.candidates)
    if least < 1:
      raise UserError(
        'nms_pre, proposals, detections and candidates must be at least 1, got '
        f'{self.nms_pre}, {self.proposals}, {self.detections} and {self.candidates}'
      )

  @property
  def backbone(self) -> Any:
    """Settings of the encoder."""
    names = {field.name for field in dataclasses.fields(self.backbone_settings)}
    shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
    return self.backbone_settings(**shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedSettings(DetectorSettings):
  """Settings of a detector whose transformer blocks attend within windows, but for some.

  `image_size` is only what is usual: images may have any size whose sides are multiples of 32.

  Attributes:
    position_image_size: (height, width) that the position embedding is for; it is resized to the
      images in every forward pass.
    window_size, global_blocks: see `HiViTEncoder.features`.
  """

  position_image_size: tuple[int, int] = (224, 224)
  window_size: int | None = 14
  global_blocks: tuple[int, ...] = ()

  level_norms: ClassVar[bool] = False

  @property
  def backbone(self) -> Any:
    """Settings of the encoder."""
    own = {'image_size': self.position_image_size, 'level_norms': self.level_norms}
    return dataclasses.replace(super().backbone, **own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRCNNSettings(WindowedSettings, HiViTSettings):
  """Settings of HiViT with FPN and Mask R-CNN."""

  rpe: bool = False
  backbone_settings = BackboneSettings
  level_norms = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTMaskRCNNSettings(WindowedSettings, ViTSettings):
  """Settings of ViT with a simple feature pyramid and Mask R-CNN."""

  backbone_settings = ViTDetBackboneSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinMaskRCNNSettings(DetectorSettings, SwinSettings):
  """Settings of Swin with FPN and Mask R-CNN, for images on canvases of `image_size`."""

  backbone_settings = SwinSettings
