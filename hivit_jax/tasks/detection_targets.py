"""What Mask R-CNN learns from the objects of an image: functions of one image, for `jax.vmap`.

Objects stand in M slots: boxes (M, 4), labels (M,), whether they exist (M,).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hivit_jax.detection import boxes as box_ops
from hivit_jax.detection.assign import NEITHER, Rule, Sample, assign, sample

RPN_RULE = Rule(positive=0.7, negative=0.3, minimum=0.3)
ROI_RULE = Rule(positive=0.5, negative=0.5, minimum=0.5)


class RoIs(NamedTuple):
  """Boxes that the heads learn from, in slots, positives first.

  Attributes:
    boxes: (R, 4).
    sample: which are used, which are positive, and their objects.
  """

  boxes: jax.Array
  sample: Sample


def rpn_sample(
  anchors: jax.Array,
  valid: jax.Array,
  boxes: jax.Array,
  exists: jax.Array,
  priorities: jax.Array,
  total: int,
) -> Sample:
  """Anchors that learn, at most half of them positive; the objects alone decide.

  Args:
    anchors: (A, 4).
    valid: (A,) bool, anchors of the image.
    boxes, exists: of the objects.
    priorities: (A,) random numbers.
    total: slots.
  """
  assigned = assign(box_ops.iou(anchors, boxes), valid, exists, RPN_RULE)
  return sample(assigned, priorities, total // 2, total)


def roi_sample(
  proposals: jax.Array,
  valid: jax.Array,
  boxes: jax.Array,
  exists: jax.Array,
  priorities: jax.Array,
  total: int,
) -> RoIs:
  """RoIs that learn, at most a quarter of them positive, from the objects and the proposals.

  Args:
    proposals: (P, 4).
    valid: (P,) bool.
    boxes, exists: of the objects.
    priorities: (M + P,) random numbers, the objects' first.
    total: slots.
  """
  assigned = assign(box_ops.iou(proposals, boxes), valid, exists, ROI_RULE)
  themselves = jnp.where(exists, jnp.arange(1, len(boxes) + 1), NEITHER)
  chosen = sample(jnp.concatenate([themselves, assigned]), priorities, total // 4, total)
  candidates = jnp.concatenate([boxes.astype(proposals.dtype), proposals])
  rois = jnp.where(chosen.valid[:, None], candidates[chosen.index], 0)
  return RoIs(rois, chosen)
