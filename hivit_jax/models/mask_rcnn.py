"""Mask R-CNN (arXiv 1703.06870) on HiViT: boxes, classes and masks of objects.

Everything has a fixed shape: proposals and detections stand in slots, of which some are empty.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.detection import anchors as anchor_ops
from hivit_jax.detection import boxes as box_ops
from hivit_jax.detection.nms import nms
from hivit_jax.detection.roi_align import roi_align
from hivit_jax.errors import UserError
from hivit_jax.models.backbone import BackboneSettings, HiViTBackbone
from hivit_jax.models.detection_heads import FPN, BoxHead, MaskHead, RPNHead
from hivit_jax.models.hivit import HiViTSettings
from hivit_jax.models.units import UNIT

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
BOX_SIZE, MASK_SIZE = 7, 14  # cells along a side of a RoI's features
MASK_CELLS = 2 * MASK_SIZE

_NEVER = -jnp.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRCNNSettings(HiViTSettings):
  """Settings of HiViT with FPN and Mask R-CNN; the defaults are the published detector's.

  `image_size` is only what is usual: images may have any size whose sides are multiples of 32.

  Attributes:
    position_image_size: (height, width) that the position embedding is for; it is resized to the
      images in every forward pass.
    window_size, global_blocks: see `HiViTEncoder.features`.
    num_classes: of objects, without the background.
    neck_channels: of the pyramid and the heads' convolutions.
    hidden: width of the box head's layer between.
    nms_pre: proposals of a level before suppression: (in training, in testing).
    proposals: of an image at most.
    detections: of an image at most.
    candidates: pairs of RoI and class that the last suppression sees at most.
    score_threshold: which a detection must exceed.
  """

  rpe: bool = False
  position_image_size: tuple[int, int] = (224, 224)
  window_size: int | None = 14
  global_blocks: tuple[int, ...] = ()
  num_classes: int = 80
  neck_channels: int = 256
  hidden: int = 1024
  nms_pre: tuple[int, int] = (2000, 1000)
  proposals: int = 1000
  detections: int = 100
  candidates: int = 4096
  score_threshold: float = 0.05

  def __post_init__(self):
    super().__post_init__()
    if self.num_classes < 1:
      raise UserError(f'num_classes must be at least 1, got {self.num_classes}')
    least = min(*self.nms_pre, self.proposals, self.detections, self.candidates)
    if least < 1:
      raise UserError(
        'nms_pre, proposals, detections and candidates must be at least 1, got '
        f'{self.nms_pre}, {self.proposals}, {self.detections} and {self.candidates}'
      )

  @property
  def backbone(self) -> BackboneSettings:
    """Settings of the encoder."""
    fields = dataclasses.fields(HiViTSettings)
    shared: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields}
    shared['image_size'] = self.position_image_size
    return BackboneSettings(
      **shared,
      window_size=self.window_size,
      global_blocks=self.global_blocks,
      level_norms=True,
    )


class Proposals(NamedTuple):
  """Boxes that may hold an object, best first: (B, P, 4), (B, P) logits, (B, P) bool."""

  boxes: jax.Array
  scores: jax.Array
  valid: jax.Array


class Detections(NamedTuple):
  """Found objects of each image in D slots, best first.

  Attributes:
    boxes: (B, D, 4) in pixels of the image as it was given.
    scores: (B, D) in (0, 1).
    labels: (B, D) int32.
    valid: (B, D) bool; False: an empty slot.
    masks: (B, D, 28, 28) probabilities within the boxes.
  """

  boxes: jax.Array
  scores: jax.Array
  labels: jax.Array
  valid: jax.Array
  masks: jax.Array


class _RoIHead(nnx.Module):
  """Both heads under the name that mmdetection has for them."""

  def __init__(self, bbox_head: BoxHead, mask_head: MaskHead):
    self.bbox_head, self.mask_head = bbox_head, mask_head


class MaskRCNN(nnx.Module):
  """Detector and instance segmenter.

  Images are (B, H, W, channels), normalised, with sides that are multiples of 32. Each may be
  smaller than the canvas of its batch, in whose upper left it is: `sizes` (B, 2) are heights and
  widths without padding, `canvases` (B, 2) are these rounded up to multiples of 32. With them
  nothing depends on the batch's canvas; without (None) all of it takes part, as in mmdetection.
  """

  def __init__(self, settings: MaskRCNNSettings, *, rngs: nnx.Rngs):
    self.settings = settings
    self.image_size, self.channels = settings.image_size, settings.channels
    self.num_classes = settings.num_classes
    width, options = settings.neck_channels, {'rngs': rngs, 'dtype': settings.dtype}
    self.backbone = HiViTBackbone(settings.backbone, rngs=rngs)
    inputs = [info.channels for info in self.backbone.feature_info]
    self.neck = FPN(inputs, width, **options)
    self.rpn_head = RPNHead(width, **options)
    self.roi_head = _RoIHead(
      BoxHead(width, settings.hidden, settings.num_classes, size=BOX_SIZE, **options),
      MaskHead(width, settings.num_classes, **options),
    )

  @property
  def drop_path_rates(self) -> tuple[float, ...]:
    """Of the backbone's blocks."""
    return self.backbone.drop_path_rates

  def drop_path_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """See `Encoder.drop_path_noise`."""
    return self.backbone.drop_path_noise(rng, batch)

  def pyramid(
    self,
    images: jax.Array,
    canvases: jax.Array | None = None,
    *,
    drop_path_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """(B, H, W, channels) -> five maps (B, h, w, C) of strides 4 to 64; see the class."""
    units = None if canvases is None else canvases // UNIT
    maps = self.backbone(images, own=units, drop_path_noise=drop_path_noise)
    return self.neck(maps, own_maps(canvases))

  def rpn(
    self, maps: Sequence[jax.Array], canvases: jax.Array | None = None
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Logits (B, A) and deltas (B, A, 4) of the anchors of each level."""
    found = map(self.rpn_head, maps, own_maps(canvases) or [None] * len(maps))
    logits, deltas = zip(*found, strict=True)
    return list(logits), list(deltas)

  def proposals(
    self,
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    shapes: Sequence[tuple[int, int]],
    sizes: jax.Array,
    canvases: jax.Array | None = None,
    *,
    train: bool,
  ) -> Proposals:
    """What is left of the anchors: decoded, clipped, suppressed within each level, best first.

    No gradient goes through them.

    Args:
      logits, deltas: from `rpn`.
      shapes: (rows, columns) of each level.
      sizes, canvases: see the class.
      train: takes the first number of `nms_pre`.

    Returns:
      As many slots as `settings.proposals`, or fewer if there are fewer anchors.
    """
    settings, strides = self.settings, anchor_ops.STRIDES
    per_level = settings.nms_pre[0 if train else 1]
    logits, deltas = jax.lax.stop_gradient((list(logits), list(deltas)))
    anchors = [anchor_ops.level_anchors(shape, s) for shape, s in zip(shapes, strides, strict=True)]

    own = own_maps(canvases)
    if own is not None:
      logits = [
        jnp.where(jax.vmap(anchor_ops.level_valid, (None, 0))(shape, size), score, _NEVER)
        for score, shape, size in zip(logits, shapes, own, strict=True)
      ]

    def of_image(logits, deltas, size):
      found = []
      for score, delta, anchor in zip(logits, deltas, anchors, strict=True):
        score, index = jax.lax.top_k(score, min(per_level, len(score)))
        decoded = box_ops.decode(anchor[index], delta[index], RPN_STDS)
        decoded = box_ops.clip(decoded, size)
        keep = nms(decoded, 0.7, ~box_ops.is_empty(decoded) & (score > _NEVER))
        found.append((decoded, jnp.where(keep, score, _NEVER)))
      boxes, scores = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
      scores, index = jax.lax.top_k(scores, min(settings.proposals, len(scores)))
      valid = scores > _NEVER
      return Proposals(jnp.where(valid[:, None], boxes[index], 0), scores, valid)

    return jax.vmap(of_image)(logits, deltas, sizes)

  def roi_features(
    self,
    maps: Sequence[jax.Array],
    rois: jax.Array,
    size: int,
    canvases: jax.Array | None = None,
  ) -> jax.Array:
    """(B, R, 4) RoIs -> (B * R, size, size, C) features from P2..P5; see the class."""
    strides, own = anchor_ops.STRIDES[:4], own_maps(canvases)

    def of_image(levels, rois, own):
      return roi_align(levels, rois, strides, size, own)

    out = jax.vmap(of_image)(list(maps[:4]), rois, None if own is None else own[:4])
    return out.reshape(-1, *out.shape[2:])

  def detect(
    self, images: jax.Array, sizes: jax.Array, canvases: jax.Array | None = None
  ) -> Detections:
    """Finds objects; the arguments are those that the class tells."""
    maps = self.pyramid(images, canvases)
    logits, deltas = self.rpn(maps, canvases)
    shapes = [(x.shape[1], x.shape[2]) for x in maps]
    proposals = self.proposals(logits, deltas, shapes, sizes, canvases, train=False)
    b, r = proposals.valid.shape
    features = self.roi_features(maps, proposals.boxes, BOX_SIZE, canvases)
    class_logits, deltas = self.roi_head.bbox_head(features)
    boxes, scores, labels, valid = jax.vmap(self.final_boxes)(
      proposals.boxes,
      proposals.valid,
      class_logits.reshape(b, r, -1),
      deltas.reshape(b, r, -1, 4),
      sizes,
    )
    features = self.roi_features(maps, boxes, MASK_SIZE, canvases)
    mask_logits = self.roi_head.mask_head(features, labels.reshape(-1))
    masks = nnx.sigmoid(mask_logits).reshape(*labels.shape, MASK_CELLS, MASK_CELLS)
    return Detections(boxes, scores, labels, valid, masks)

  def final_boxes(
    self,
    rois: jax.Array,
    valid: jax.Array,
    logits: jax.Array,
    deltas: jax.Array,
    size: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Detections of one image from what the box head says of its RoIs.

    Args:
      rois: (R, 4).
      valid: (R,) bool.
      logits: (R, classes + 1), the background last.
      deltas: (R, classes, 4).
      size: (2,) height and width of the image.

    Returns:
      Boxes, scores, labels and which slots are used, see `Detections`.
    """
    boxes = box_ops.clip(box_ops.decode(rois[:, None], deltas, BOX_STDS), size)
    scores = jax.nn.softmax(logits, axis=-1)[:, :-1]
    return suppress_classes(
      boxes,
      jnp.where(valid[:, None], scores, 0),
      threshold=self.settings.score_threshold,
      candidates=self.settings.candidates,
      most=self.settings.detections,
    )


def own_maps(canvases: jax.Array | None) -> list[jax.Array] | None:
  """(B, 2) canvases of the images -> (B, 2) rows and columns of their maps on each level."""
  if canvases is None:
    return None
  return [-(-canvases // stride) for stride in anchor_ops.STRIDES]


def suppress_classes(
  boxes: jax.Array, scores: jax.Array, *, threshold: float, candidates: int, most: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The best boxes of all classes, suppressed within each class.

  Args:
    boxes: (R, classes, 4).
    scores: (R, classes).
    threshold: that a score must exceed.
    candidates: the best pairs of RoI and class that are looked at.
    most: slots of the result.

  Returns:
    (most, 4) boxes, (most,) scores, labels and which slots are used; zeros in the others. Fewer
    slots if there are fewer pairs.
  """
  classes = scores.shape[1]
  score, index = jax.lax.top_k(scores.reshape(-1), min(candidates, scores.size))
  boxes, labels = boxes.reshape(-1, 4)[index], index % classes
  keep = nms(boxes, 0.5, score > threshold, groups=labels)
  score, best = jax.lax.top_k(jnp.where(keep, score, 0), min(most, len(score)))
  valid = score > 0
  boxes, labels = boxes[best], labels[best].astype(jnp.int32)
  return jnp.where(valid[:, None], boxes, 0), score, jnp.where(valid, labels, 0), valid
