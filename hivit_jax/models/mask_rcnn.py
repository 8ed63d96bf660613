"""Mask R-CNN (arXiv 1703.06870) on HiViT, ViT or Swin: boxes, classes and masks of objects.

Everything has a fixed shape: proposals and detections stand in slots, of which some are empty.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.detection import anchors as anchor_ops
from hivit_jax.detection import boxes as box_ops
from hivit_jax.detection.nms import nms
from hivit_jax.detection.roi_align import roi_align
from hivit_jax.models.backbone import HiViTBackbone
from hivit_jax.models.detection_heads import FPN, BoxHead, MaskHead, RPNHead, SimplePyramid
from hivit_jax.models.detector_settings import DetectorSettings
from hivit_jax.models.swin_backbone import SwinBackbone
from hivit_jax.models.units import UNIT
from hivit_jax.models.vit_backbone import ViTDetBackbone

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
BOX_SIZE, MASK_SIZE = 7, 14  # cells along a side of a RoI's features
MASK_CELLS = 2 * MASK_SIZE


class Stage(NamedTuple):
  """What distinguishes the box heads of a cascade.

  Attributes:
    overlap: IoU with an object from which a RoI is positive.
    stds: of the deltas.
    weight: of the losses.
  """

  overlap: float = 0.5
  stds: tuple[float, ...] = BOX_STDS
  weight: float = 1.0


# Of Cascade R-CNN (arXiv 1712.00726); without a cascade there is the first.
STAGES = (
  Stage(),
  Stage(0.6, tuple(std / 2 for std in BOX_STDS), 0.5),
  Stage(0.7, tuple(std / 3 for std in BOX_STDS), 0.25),
)

_NEVER = -jnp.inf


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
  """Both heads under the names that mmdetection has for them."""

  def __init__(self, bbox_head: BoxHead | nnx.List, mask_head: MaskHead):
    self.bbox_head, self.mask_head = bbox_head, mask_head


class MaskRCNN(nnx.Module):
  """Detector and instance segmenter.

  Images are (B, H, W, channels), normalised, with sides that are multiples of 32. Each may be
  smaller than the canvas of its batch, in whose upper left it is: `sizes` (B, 2) are heights and
  widths without padding, `canvases` (B, 2) are these rounded up to multiples of 32. With them
  nothing depends on the batch's canvas; without (None) all of it takes part, as in mmdetection.
  """

  backbone_class: ClassVar[type[HiViTBackbone | ViTDetBackbone | SwinBackbone]] = HiViTBackbone
  neck_class: ClassVar[type[FPN | SimplePyramid]] = FPN
  any_canvas: ClassVar[bool] = True  # False: only one of `image_size`

  def __init__(self, settings: DetectorSettings, *, rngs: nnx.Rngs):
    self.settings = settings
    self.image_size, self.channels = settings.image_size, settings.channels
    self.num_classes = settings.num_classes
    width, options = settings.neck_channels, {'rngs': rngs, 'dtype': settings.dtype}
    self.backbone: Any = self.backbone_class(settings.backbone, rngs=rngs)
    inputs = [info.channels for info in self.backbone.feature_info]
    self.neck = self.neck_class(inputs, width, **options)
    self.rpn_head = RPNHead(width, **options)
    classes = settings.num_classes

    def box_head(boxes: int) -> BoxHead:
      return BoxHead(width, settings.hidden, classes, size=BOX_SIZE, boxes=boxes, **options)

    heads = nnx.List(box_head(1) for _ in STAGES) if settings.cascade else box_head(classes)
    self.roi_head = _RoIHead(heads, MaskHead(width, classes, **options))

  @property
  def box_heads(self) -> list[tuple[BoxHead, Stage]]:
    """The box heads, one after the other."""
    heads = self.roi_head.bbox_head
    return list(zip([heads] if isinstance(heads, BoxHead) else heads, STAGES, strict=False))

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
    maps = self.maps(images, canvases, drop_path_noise)
    return self.neck(maps, own_maps(canvases))

  def maps(
    self, images: jax.Array, canvases: jax.Array | None, drop_path_noise: jax.Array | None
  ) -> tuple[jax.Array, ...]:
    """The backbone's four maps; arguments as for `pyramid`."""
    units = None if canvases is None else canvases // UNIT
    return self.backbone(images, own=units, drop_path_noise=drop_path_noise)

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
    anchors = [
      anchor_ops.level_anchors(shape, stride, settings.anchor_scale)
      for shape, stride in zip(shapes, strides, strict=True)
    ]

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
    """Finds objects; the class describes the arguments."""
    maps = self.pyramid(images, canvases)
    logits, deltas = self.rpn(maps, canvases)
    shapes = [(x.shape[1], x.shape[2]) for x in maps]
    proposals = self.proposals(logits, deltas, shapes, sizes, canvases, train=False)
    (b, r), rois, of_stages = proposals.valid.shape, proposals.boxes[:, :, None], []
    for head, stage in self.box_heads:
      rois = rois[:, :, 0]
      class_logits, deltas = head(self.roi_features(maps, rois, BOX_SIZE, canvases))
      of_stages.append(jax.nn.softmax(class_logits.reshape(b, r, -1), axis=-1)[..., :-1])
      rois = refined(rois, deltas.reshape(b, r, -1, 4), stage, sizes)
    scores = jnp.where(proposals.valid[..., None], sum(of_stages) / len(of_stages), 0)
    boxes = jnp.broadcast_to(rois, (*scores.shape, 4))
    boxes, scores, labels, valid = jax.vmap(self.final_boxes)(boxes, scores)
    features = self.roi_features(maps, boxes, MASK_SIZE, canvases)
    mask_logits = self.roi_head.mask_head(features, labels.reshape(-1))
    masks = nnx.sigmoid(mask_logits).reshape(*labels.shape, MASK_CELLS, MASK_CELLS)
    return Detections(boxes, scores, labels, valid, masks)

  def final_boxes(
    self, boxes: jax.Array, scores: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(R, classes, 4) boxes and (R, classes) scores of an image -> see `suppress_classes`."""
    settings = self.settings
    return suppress_classes(
      boxes,
      scores,
      threshold=settings.score_threshold,
      candidates=settings.candidates,
      most=settings.detections,
    )


class ViTMaskRCNN(MaskRCNN):
  """Mask R-CNN on ViT, as a baseline: ViTDet (arXiv 2203.16527) with the heads of `MaskRCNN`."""

  backbone_class = ViTDetBackbone
  neck_class = SimplePyramid


class SwinMaskRCNN(MaskRCNN):
  """Mask R-CNN on Swin, as a baseline.

  Shifted windows wrap around the canvas, and the zeros around an image take part, as published: its
  features depend on the canvas, which has the model's `image_size`.
  """

  backbone_class = SwinBackbone
  any_canvas = False

  def maps(
    self, images: jax.Array, canvases: jax.Array | None, drop_path_noise: jax.Array | None
  ) -> tuple[jax.Array, ...]:
    """See `MaskRCNN`."""
    del canvases
    return self.backbone(images, drop_path_noise=drop_path_noise)


def refined(rois: jax.Array, deltas: jax.Array, stage: Stage, sizes: jax.Array) -> jax.Array:
  """(B, R, 4) RoIs, (B, R, n, 4) deltas -> (B, R, n, 4) boxes, clipped to images of (B, 2)."""
  boxes = box_ops.decode(rois[:, :, None], deltas, stage.stds)
  return jax.vmap(box_ops.clip)(boxes, sizes)


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
