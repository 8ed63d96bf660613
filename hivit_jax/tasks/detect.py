"""Detection and instance segmentation as a task for the training loop: Mask R-CNN.

A batch has, for each example, objects in M slots:

    image     (H, W, channels) uint8, the picture in the upper left of a canvas
    size      (2,) int32, height and width of the picture
    boxes     (M, 4) float32 in pixels; labels (M,) int32; exists (M,) bool
    masks     (M, 112, 112) uint8, coverage of each box, see `data.masks.crop`
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.detection import anchors as anchor_ops
from hivit_jax.detection import boxes as box_ops
from hivit_jax.detection.assign import Sample
from hivit_jax.detection.mask_targets import CROP, mask_targets
from hivit_jax.errors import UserError
from hivit_jax.models.mask_rcnn import BOX_SIZE, MASK_CELLS, MASK_SIZE, MaskRCNN, refined
from hivit_jax.tasks import detection_losses as losses
from hivit_jax.tasks import detection_targets as targets
from hivit_jax.tasks.evaluators import Context, Evaluator
from hivit_jax.tasks.images import normalize_padded
from hivit_jax.tasks.task import Batch, ImageTask

_log = logging.getLogger(__name__)

PADDING = 32  # pixels: an image's own canvas has sides that are multiples of it


def own_canvas(sizes: jax.Array) -> jax.Array:
  """(..., 2) heights and widths, rounded up to the multiples that an image alone would have."""
  return -(-sizes // PADDING) * PADDING


@dataclasses.dataclass(frozen=True)
class DetectTask(ImageTask):
  """Find objects: their boxes, classes and masks.

  The defaults are the published recipe's, for a canvas that all of its images fit on.

  Attributes:
    num_classes: of the model, without the background.
    image_size: (height, width) of the canvas that images are padded to, multiples of 32.
    buckets, eval_buckets: the same of several canvases, where the sizes of images are known before
      these are read: a batch is on the smallest that its images fit on. Empty: only `image_size`.
    channels: of the images.
    flip: half of the images are mirrored.
    short_sides, long_side: what the sides of an image become at most, see
      `detection_transforms.Augmentation`.
    crop_first: the same for the images that are cropped; empty: no image is.
    crop_sides: least and most of a crop's sides.
    scale_jitter: least and most of the factor of `detection_transforms.ScaleJitter`, which takes
      the place of these on a square canvas; empty: it does not.
    eval_short_side: of images in evaluations.
    objects: slots for the objects of an image.
    anchors: of an image that the proposals learn from.
    rois: of an image that the heads learn from; the masks learn from a quarter at most.
  """

  model_class = MaskRCNN
  model_kind = 'detector'
  # As published: HiViT's position embeddings decay, because the official exemption matches no
  # name; Swin's tables do not.
  rules = (
    (r'(.*/)?(bias|scale)', 'no_decay'),
    (r'.*/relative_position_bias_table', 'no_decay'),
    (r'.*', 'decay'),
  )
  encoder = 'backbone/'
  stem_is_one_layer = True
  object_classes = True
  any_images = False
  measures = frozenset(('evaluation', 'pictures'))
  example = 'predict {workdir} PICTURE.jpg --save=FOLDER'

  num_classes: int
  image_size: tuple[int, int] = (1344, 1344)
  channels: int = 3
  flip: bool = True
  short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
  long_side: int = 1333
  crop_first: tuple[int, ...] = (400, 500, 600)
  crop_sides: tuple[int, int] = (384, 600)
  scale_jitter: tuple[float, ...] = ()
  eval_short_side: int = 800
  buckets: tuple[tuple[int, int], ...] = ()
  eval_buckets: tuple[tuple[int, int], ...] = ()
  objects: int = 100
  anchors: int = 256
  rois: int = 512

  def __post_init__(self):
    for key in ('image_size', 'detect.buckets', 'detect.eval_buckets'):
      sizes = getattr(self, key.removeprefix('detect.'))
      if np.any(np.array(sizes, int) % PADDING):
        raise UserError(f'{key}={sizes}: detection needs sides that are multiples of {PADDING}')
    if self.scale_jitter and len({*self.image_size}) > 1:
      height, width = self.image_size
      raise UserError(
        f'config.detect.scale_jitter={self.scale_jitter} needs a square canvas, and '
        f'config.image_size is {height}x{width}; try --config.image_size={max(height, width)}'
      )

  def input(self, train: bool) -> Callable[..., dict[str, Any]]:
    """See `detection_transforms.TrainTransform` and `EvalTransform`."""
    from hivit_jax.data import detection_transforms  # here: a benchmark of a step needs no data

    if not train:
      return detection_transforms.EvalTransform(
        self.eval_short_side, self.long_side, self.image_size, self.channels
      )
    return detection_transforms.TrainTransform(
      self._augmentation, self.image_size, self.objects, self.channels
    )

  @property
  def _augmentation(self) -> Any:
    from hivit_jax.data import detection_transforms

    if self.scale_jitter:
      least, most = self.scale_jitter
      return detection_transforms.ScaleJitter((least, most), self.image_size[0], self.flip)
    return detection_transforms.Augmentation(
      self.short_sides, self.long_side, self.crop_first, self.crop_sides, self.flip
    )

  def order(self, source: Any, seed: int, batch_size: int) -> Any:
    """See `buckets.Bucketed`."""
    from hivit_jax.data import buckets

    scenes = getattr(source, 'scenes', None)
    if not self.buckets or scenes is None:
      return None
    return buckets.Bucketed(
      scenes[:, :2], self._augmentation.sizes, self.buckets, batch_size=batch_size, seed=seed
    )

  def eval_order(self, source: Any, batch_size: int) -> Any:
    """See `buckets.BucketedPass`."""
    from hivit_jax.data import buckets, detection_transforms

    scenes = getattr(source, 'scenes', None)
    if not self.eval_buckets or scenes is None:
      return None
    sizes = detection_transforms.fitted_sizes(scenes[:, :2], self.eval_short_side, self.long_side)
    return buckets.BucketedPass.of(sizes, self.eval_buckets, batch_size)

  def shapes(self, size: tuple[int, int], channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """See `Task`."""
    slots, side = self.objects, CROP
    return {
      'image': jax.ShapeDtypeStruct((*size, channels), jnp.uint8),
      'size': jax.ShapeDtypeStruct((2,), jnp.int32),
      'boxes': jax.ShapeDtypeStruct((slots, 4), jnp.float32),
      'labels': jax.ShapeDtypeStruct((slots,), jnp.int32),
      'exists': jax.ShapeDtypeStruct((slots,), jnp.bool_),
      'masks': jax.ShapeDtypeStruct((slots, side, side), jnp.uint8),
    }

  def prepare(self, model: MaskRCNN, batch: Batch, rng: jax.Array) -> Batch:
    """Draws all random numbers, and chooses the anchors that learn: the objects alone decide.

    Args:
      model: the model to be trained.
      batch: see above.
      rng: PRNG key of this step.

    Returns:
      The batch with `anchor_*` (B, slots) of `assign.Sample`, `anchor_count` (), how many learn,
      `images` (), how many there are, `roi_priorities` (B, M + proposals) and, with drop path,
      `drop_path_noise` (B, blocks, 2).
    """
    for_anchors, for_rois, drop_path = jax.random.split(rng, 3)
    b, height, width, _ = batch['image'].shape
    _tell('the training step', (height, width), self.buckets)
    shapes = map_shapes(height, width)
    anchors = all_anchors(shapes, model.settings.anchor_scale)
    own = own_shapes(own_canvas(batch['size']))
    priorities = jax.vmap(lambda key: targets.anchor_priorities(key, shapes))(
      jax.random.split(for_anchors, b)
    )
    sample: Sample = jax.vmap(
      lambda own, *objects: targets.rpn_sample(
        anchors, valid_anchors(shapes, own), *objects, total=self.anchors
      )
    )(own, batch['boxes'], batch['exists'], priorities)
    slots = batch['boxes'].shape[1] + model.settings.proposals
    prepared = {
      **batch,
      **{f'anchor_{key}': value for key, value in sample._asdict().items()},
      'anchor_count': jnp.maximum(sample.valid.sum(), 1).astype(jnp.float32),
      'images': jnp.asarray(b, jnp.float32),
      'roi_priorities': jax.random.uniform(for_rois, (b, slots)),
    }
    if any(model.drop_path_rates):
      prepared['drop_path_noise'] = model.drop_path_noise(drop_path, b)
    return prepared

  def loss(self, model: MaskRCNN, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Five losses, added; metrics are their shares and the share of RoIs classified rightly.

    What anchors lose is divided by how many of the whole batch learn. How many RoIs and positive
    ones there are depends on the proposals, so these losses are means over the part, weighted by
    its share in the images; with the whole batch in one part they are plain means.

    The box head's BatchNorm takes its statistics from the part as well. Segmentation refuses
    parts for this; here they are allowed, because a single image has hundreds of RoIs of 49
    cells each to take them from, and without parts the published batch needs several GPUs.
    """
    return self.losses(model, batch, own_canvas(batch['size']))

  def losses(self, model: MaskRCNN, batch: Batch, canvases: jax.Array | None):
    """`loss`, where None for `canvases` lets all of the batch's canvas take part."""
    maps = model.pyramid(
      self.padded_images(batch), canvases, drop_path_noise=batch.get('drop_path_noise')
    )
    logits, deltas = model.rpn(maps, canvases)
    shapes = [(x.shape[1], x.shape[2]) for x in maps]
    boxes, exists = batch['boxes'], batch['exists']
    sample = Sample(*(batch[f'anchor_{key}'] for key in Sample._fields))
    of_class, of_box = jax.vmap(losses.rpn_sums, in_axes=(0, 0, None, 0, 0))(
      jnp.concatenate(logits, axis=1),
      jnp.concatenate(deltas, axis=1),
      all_anchors(shapes, model.settings.anchor_scale),
      boxes,
      sample,
    )
    proposals = model.proposals(logits, deltas, shapes, batch['size'], canvases, train=True)
    slots = exists.shape[1] + proposals.valid.shape[1]
    rois = jax.vmap(lambda *x: targets.roi_sample(*x, total=self.rois))(
      proposals.boxes, proposals.valid, boxes, exists, batch['roi_priorities'][:, :slots]
    )
    share = len(boxes) / batch['images']
    means = self._box_means(model, maps, rois, batch, canvases)
    terms = {
      'rpn_class': of_class.sum() / batch['anchor_count'],
      'rpn_box': of_box.sum() / batch['anchor_count'],
      'class': share * means['class'],
      'box': share * means['box'],
      'mask': share * self._mask_loss(model, maps, rois, batch, canvases),
    }
    metrics = {f'loss_{key}': value for key, value in terms.items()}
    return jnp.asarray(sum(terms.values())), metrics | {'roi_accuracy': share * means['right']}

  def _box_means(self, model, maps, rois, batch, canvases):
    """Means of `losses.box_sums` over the RoIs that learn; a cascade's losses are added."""
    heads, means = model.box_heads, {'class': 0, 'box': 0, 'right': 0}
    for i, (head, stage) in enumerate(heads):
      sample, valid = rois.sample, rois.sample.valid.reshape(-1)
      features = model.roi_features(maps, rois.boxes, BOX_SIZE, canvases)
      logits, deltas = head(features, valid)
      labels = jnp.take_along_axis(batch['labels'], sample.object, axis=1)
      labels = jnp.where(sample.positive, labels, self.num_classes).reshape(-1)
      of_objects = jnp.take_along_axis(batch['boxes'], sample.object[..., None], axis=1)
      boxes, of_objects = rois.boxes.reshape(-1, 4), of_objects.reshape(-1, 4)
      sums = losses.box_sums(logits, deltas, boxes, labels, of_objects, valid, stage.stds)
      weights = {'class': stage.weight, 'box': stage.weight, 'right': 1 / len(heads)}
      count = jnp.maximum(valid.sum(), 1)
      means = {key: means[key] + weights[key] * sums[key] / count for key in means}
      if i + 1 < len(heads):
        deltas = jax.lax.stop_gradient(deltas).reshape(*rois.boxes.shape[:2], -1, 4)
        boxes = refined(rois.boxes, deltas, stage, batch['size'])[:, :, 0]
        match = functools.partial(targets.matched, overlap=heads[i + 1][1].overlap)
        rois = jax.vmap(match)(boxes, sample.valid, batch['boxes'], batch['exists'])
    return means

  def _mask_loss(self, model, maps, rois, batch, canvases):
    """Mean over the positive RoIs, which are in the first slots."""
    most = self.rois // 4
    boxes, positive = rois.boxes[:, :most], rois.sample.positive[:, :most]
    owner = rois.sample.object[:, :most]
    features = model.roi_features(maps, boxes, MASK_SIZE, canvases)
    labels = jnp.take_along_axis(batch['labels'], owner, axis=1)
    logits = model.roi_head.mask_head(features, labels.reshape(-1))
    # A RoI is no longer than the canvas: no bin has more samples.
    samples = -(-max(batch['image'].shape[1:3]) // MASK_CELLS)
    wanted = jax.vmap(functools.partial(_targets_of_image, samples=samples))(
      batch['masks'], batch['boxes'], owner, boxes, batch['size']
    )
    total = losses.mask_sum(logits, wanted.reshape(logits.shape), positive.reshape(-1))
    return total / jnp.maximum(positive.sum(), 1)

  def evaluators(self, context: Context) -> list[Evaluator]:
    """COCO's measures of boxes and masks on each set, and pictures."""
    from hivit_jax.tasks import detection_evaluation

    return detection_evaluation.evaluators(context, self)

  def detections(self, model: MaskRCNN, batch: Batch) -> dict[str, jax.Array]:
    """What `detection_results.of_batch` needs of an evaluation batch."""
    sizes = batch['size']
    _tell('the evaluation', batch['image'].shape[1:3], self.eval_buckets)
    # Rows that are padding have no size; on a canvas of their own they would divide by zero.
    canvases = jnp.maximum(own_canvas(sizes), PADDING)
    found = model.detect(self.padded_images(batch), sizes, canvases)
    return {**found._asdict(), 'size': sizes, 'original': batch['original']}

  def padded_images(self, batch: Batch) -> jax.Array:
    """Normalised images with zeros, not black, around the pictures."""
    return normalize_padded(batch['image'], batch['size'], self.mean, self.std)


def _tell(what: str, size: tuple[int, ...], canvases: tuple[tuple[int, int], ...]) -> None:
  """Logs for which of the canvases a program is traced, which happens once for each."""
  known = list(map(tuple, canvases))
  if tuple(size) in known:
    place = known.index(tuple(size)) + 1
    _log.info('compiling %s for %dx%d (%d of %d)', what, *size, place, len(known))


def _targets_of_image(masks, boxes, owner, rois, size, *, samples):
  rois = box_ops.clip(rois, size)
  return mask_targets(masks[owner], boxes[owner], rois, MASK_CELLS, samples)


def map_shapes(height: int, width: int) -> list[tuple[int, int]]:
  """(rows, columns) of the five levels of a canvas whose sides are multiples of 32."""
  return [(-(-height // s), -(-width // s)) for s in anchor_ops.STRIDES]


def own_shapes(canvas: jax.Array) -> jax.Array:
  """(B, 2) sizes of the images' own canvases -> (B, 5, 2) shapes of their maps."""
  return jax.vmap(anchor_ops.own_shapes)(canvas)


def all_anchors(shapes: list[tuple[int, int]], scale: float = anchor_ops.SCALE) -> jax.Array:
  """(A, 4) anchors of all levels; see `anchors.level_anchors`."""
  levels = zip(shapes, anchor_ops.STRIDES, strict=True)
  return jnp.concatenate([anchor_ops.level_anchors(shape, s, scale) for shape, s in levels])


def valid_anchors(shapes: list[tuple[int, int]], own: jax.Array) -> jax.Array:
  """(A,) bool, which of `all_anchors` are in maps of the shapes `own` (5, 2)."""
  levels = zip(shapes, own, strict=True)
  return jnp.concatenate([anchor_ops.level_valid(shape, size) for shape, size in levels])
