"""Semantic segmentation as a task for the training loop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hivit_jax.errors import UserError
from hivit_jax.models.upernet import Segmenter
from hivit_jax.tasks import photometric, pixels, segmentation
from hivit_jax.tasks.evaluators import Context, Evaluator
from hivit_jax.tasks.images import normalize_padded
from hivit_jax.tasks.task import Batch, Task
from hivit_jax.tasks.views import Views

_MEANS = ('all', 'labelled')


@dataclasses.dataclass(frozen=True)
class SegmentTask(Task):
  """Tell the class of each pixel.

  Attributes:
    mean, std: per channel, of pixels in [0, 1].
    image_size: (height, width) of the crops.
    num_classes: of the model.
    channels: of the images.
    ignore_index, reduce_zero_label: see `ClassMap`.
    scale, ratios, max_share: see `RandomScaledCrop`.
    mirror: mirror half of the training images.
    auxiliary_weight: of the second head's loss.
    mean_over: 'all': the loss is a sum over labelled pixels, divided by the number of all, as
      published; 'labelled': by the number of those.
    class_weights: of the pixels of each class; empty: 1.
    photometric: change brightness, contrast, saturation and hue.
    inference, stride, scales, mirrored: of evaluations, see `Views`.
  """

  model_class = Segmenter
  model_kind = 'segmenter'
  # As the official training, whose list of exceptions misses position embeddings.
  rules = (
    (r'(.*/)?(bias|scale)', 'no_decay'),
    (r'.*/relative_position_bias_table', 'no_decay'),
    (r'(.*/)?kernel|.*/(absolute_pos_embed|pos_embed|cls_token)', 'decay'),
  )
  encoder = 'backbone/'
  stem_is_one_layer = True
  pixel_classes = True
  any_images = True
  whole_batches = (
    'BatchNorm takes its statistics from the whole batch, and those of parts are others; more '
    'devices, --config.model.remat=True or a smaller batch need less memory'
  )
  measures = frozenset(('evaluation', 'pictures'))
  example = 'predict {workdir} PICTURE.jpg --save=FOLDER'

  mean: Sequence[float]
  std: Sequence[float]
  image_size: tuple[int, int]
  num_classes: int
  channels: int = 3
  dtype: str = 'uint8'
  ignore_index: int = 255
  reduce_zero_label: bool = False
  scale: tuple[int, int] = (2560, 640)
  ratios: tuple[float, float] = (0.5, 2.0)
  max_share: float = 0.75
  mirror: bool = True
  auxiliary_weight: float = 0.4
  mean_over: str = 'all'
  class_weights: Sequence[float] = ()
  photometric: bool = False
  inference: str = 'whole'
  stride: tuple[int, int] = (426, 426)
  scales: tuple[float, ...] = (1.0,)
  mirrored: bool = False

  def __post_init__(self):
    if self.class_weights and len(self.class_weights) != self.num_classes:
      raise UserError(
        f'config.segment.class_weights: {len(self.class_weights)} numbers for '
        f'{self.num_classes} classes; one a class, or none'
      )
    if self.mean_over not in _MEANS:
      raise UserError(
        f'config.segment.mean_over={self.mean_over}: expected one of {", ".join(_MEANS)}'
      )
    if self.photometric and (self.channels, self.dtype) != (3, 'uint8'):
      raise UserError(
        f'config.segment.photometric=True changes colours, but config.channels={self.channels} and '
        f'config.data.dtype={self.dtype}; set --config.segment.photometric=False'
      )
    self.views  # noqa: B018  (it raises what is wrong with its settings)

  @property
  def views(self) -> Views:
    """What evaluations show to the model."""
    # Here and below: a benchmark of a step needs no data.
    from hivit_jax.data.segmentation_transforms import ClassMap

    classes = ClassMap(self.num_classes, self.ignore_index, self.reduce_zero_label)
    return Views(
      self.image_size,
      self.inference,
      self.stride,
      self.scales,
      self.mirrored,
      classes=classes,
      channels=self.channels,
      dtype=self.dtype,
    )

  def input(self, train: bool) -> Callable[..., dict[str, Any]]:
    if not train:
      return self.views
    from hivit_jax.data import segmentation_transforms

    return segmentation_transforms.train_transform(
      self.image_size,
      self.num_classes,
      scale=self.scale,
      ratios=self.ratios,
      max_share=self.max_share,
      flip=self.mirror,
      channels=self.channels,
      dtype=self.dtype,
      ignore_index=self.ignore_index,
      reduce_zero_label=self.reduce_zero_label,
    )

  def shapes(self, size: tuple[int, int], channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
      'image': jax.ShapeDtypeStruct((*size, channels), jnp.dtype(self.dtype)),
      'label_map': jax.ShapeDtypeStruct(size, jnp.uint8 if self.ignore_index < 256 else jnp.uint16),
      'extent': jax.ShapeDtypeStruct((2,), jnp.int32),
    }

  def prepare(self, model: Segmenter, batch: Batch, rng: jax.Array) -> Batch:
    """Draws what is random, and counts.

    Args:
      model: the model to be trained.
      batch: `image` (B, H, W, C) as stored, `label_map` (B, H, W) integers, `extent` (B, 2): the
        rows and columns of the image, beyond which there is padding.
      rng: PRNG key of this step.

    Returns:
      The same; `count` () that the loss is divided by; `labelled` () pixels; `dropout_noise`; with
      drop path, `drop_path_noise` (B, blocks, 2).
    """
    images, labels = batch['image'], batch['label_map']
    if len(images) < 2:
      raise UserError(
        f'config.batch_size={len(images)}: BatchNorm has no variance over one example; take 2 or '
        'more'
      )
    distortion, dropout, drop_path = jax.random.split(rng, 3)
    if self.photometric:
      images = photometric.distort(images, photometric.draw(distortion, len(images)))
    labelled = jnp.maximum((labels != self.ignore_index).sum(dtype=jnp.int32), 1)
    prepared = {
      **batch,
      'image': images,
      'count': jnp.float32(labels.size) if self.mean_over == 'all' else labelled * 1.0,
      'labelled': labelled * 1.0,
      'dropout_noise': model.dropout_noise(dropout, len(images)),
    }
    if any(model.drop_path_rates):
      prepared['drop_path_noise'] = model.drop_path_noise(drop_path, len(images))
    return prepared

  def loss(self, model: Segmenter, batch: Batch) -> tuple[jax.Array, dict]:
    """Cross entropy of both heads; `pixel_accuracy` is that of the main one."""
    images = normalize_padded(batch['image'], batch['extent'], self.mean, self.std)
    logits = model.heads(
      images,
      drop_path_noise=batch.get('drop_path_noise'),
      dropout_noise=batch['dropout_noise'],
    )
    total, metrics = jnp.zeros(()), {}
    for own, weight, prefix in zip(
      logits, (1.0, self.auxiliary_weight), ('', 'auxiliary_'), strict=True
    ):
      if own is None:
        continue
      loss, right = pixels.cross_entropy(
        own,
        batch['label_map'],
        ignore_index=self.ignore_index,
        class_weights=tuple(self.class_weights),
      )
      loss = loss / batch['count']
      total += weight * loss
      metrics[f'{prefix}loss' if prefix else 'main_loss'] = loss
      metrics[f'{prefix}pixel_accuracy'] = right / batch['labelled']
    return total, metrics

  def protocol(self) -> str:
    return str(self.views)

  def evaluators(self, context: Context) -> list[Evaluator]:
    """mIoU on each set, and pictures."""
    return segmentation.evaluators(context, self)

  def logits(self, model: Segmenter, windows: jax.Array, extent: jax.Array) -> jax.Array:
    """(n, height, width, 3) uint8 windows and their (n, 2) extents -> (n, h, w, classes)."""
    return model(normalize_padded(windows, extent, self.mean, self.std))
