"""Losses of Mask R-CNN as sums, for the caller to divide; boxes, logits and sums are float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hivit_jax.detection import boxes as box_ops
from hivit_jax.detection.assign import Sample
from hivit_jax.models.mask_rcnn import BOX_STDS, RPN_STDS

GIOU_WEIGHT = 10.0


def rpn_sums(
  logits: jax.Array, deltas: jax.Array, anchors: jax.Array, boxes: jax.Array, sample: Sample
) -> tuple[jax.Array, jax.Array]:
  """Of one image: cross entropy of the sampled anchors, L1 of the positive ones' deltas.

  Args:
    logits: (A,).
    deltas: (A, 4).
    anchors: (A, 4).
    boxes: (M, 4) of the objects.
    sample: anchors that learn.

  Returns:
    () each.
  """
  of_class = sigmoid_cross_entropy(logits[sample.index], sample.positive)
  # Every slot needs sides to divide by; those that are not positive do not count.
  own = anchors[sample.index]
  target = jnp.where(sample.positive[:, None], boxes[sample.object], own)
  distance = jnp.abs(deltas[sample.index] - box_ops.encode(own, target, RPN_STDS)).sum(axis=-1)
  return (
    jnp.where(sample.valid, of_class, 0).sum(),
    jnp.where(sample.positive, distance, 0).sum(),
  )


def box_sums(
  logits: jax.Array,
  deltas: jax.Array,
  rois: jax.Array,
  labels: jax.Array,
  targets: jax.Array,
  valid: jax.Array,
  stds: Sequence[float] = BOX_STDS,
) -> dict[str, jax.Array]:
  """Of any RoIs: cross entropy, ten times the GIoU loss of the positive ones, right answers.

  Args:
    logits: (R, classes + 1), the background last.
    deltas: (R, classes, 4), or (R, 1, 4) for all classes.
    rois: (R, 4).
    labels: (R,), `classes` for the background.
    targets: (R, 4) boxes of the positive ones' objects.
    valid: (R,) bool, which count.
    stds: of the deltas.

  Returns:
    () each: `class`, `box` and `right`.
  """
  positive = valid & (labels < logits.shape[1] - 1)
  own = jnp.minimum(labels, deltas.shape[1] - 1)
  own = jnp.take_along_axis(deltas, own[:, None, None], axis=1)
  # An empty slot has no sides, whose logarithm's gradient would be NaN even where it is dropped.
  whole = jnp.array([0, 0, 1, 1], rois.dtype)
  decoded = box_ops.decode(jnp.where(positive[:, None], rois, whole), own[:, 0], stds)
  distance = 1 - box_ops.giou(decoded, jnp.where(positive[:, None], targets, whole))
  log = jax.nn.log_softmax(logits, axis=-1)
  of_class = -jnp.take_along_axis(log, labels[:, None], axis=1)[:, 0]
  right = valid & (logits.argmax(axis=-1) == labels)
  return {
    'class': jnp.where(valid, of_class, 0).sum(),
    'box': GIOU_WEIGHT * jnp.where(positive, distance, 0).sum(),
    'right': right.sum().astype(logits.dtype),
  }


def mask_sum(logits: jax.Array, targets: jax.Array, positive: jax.Array) -> jax.Array:
  """() mean cross entropy of a RoI's pixels, added over the positive RoIs.

  Args:
    logits: (R, h, w) of the RoIs' classes.
    targets: (R, h, w) of 0 and 1.
    positive: (R,) bool.
  """
  return jnp.where(positive, sigmoid_cross_entropy(logits, targets).mean(axis=(1, 2)), 0).sum()


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross entropy of the probability sigmoid(logits), elementwise."""
  return jnp.logaddexp(0, logits) - logits * targets
