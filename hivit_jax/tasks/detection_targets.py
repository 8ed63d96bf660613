"""What Mask R-CNN learns from the objects of an image: functions of one image, for `jax.vmap`.

Objects stand in M slots: boxes (M, 4), labels (M,), whether they exist (M,).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.detection import boxes as box_ops
from hivit_jax.detection.anchors import RATIOS
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


def anchor_priorities(key: jax.Array, shapes: Sequence[tuple[int, int]]) -> jax.Array:
  """Random numbers for `rpn_sample`; an anchor has the same one on every canvas.

  Args:
    key: PRNG key of the image.
    shapes: (rows, columns) of each level.

  Returns:
    (A,) in [0, 1), in the order of `anchors.level_anchors`.
  """
  # The first numbers of a row, and the first rows, do not depend on how many there are. So all rows
  # of all levels have as many, drawn at once (it compiles faster), and short rows take the first.
  most = max(rows for rows, _ in shapes)
  of_levels = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(shapes)))
  of_rows = jax.vmap(lambda key: jax.random.split(key, most))(of_levels)
  keys = jnp.concatenate([of_rows[i, :rows] for i, (rows, _) in enumerate(shapes)])
  width = len(RATIOS) * max(columns for _, columns in shapes)
  drawn = jax.vmap(lambda key: jax.random.uniform(key, (width,)))(keys)
  parts = jnp.split(drawn, np.cumsum([rows for rows, _ in shapes])[:-1])
  return jnp.concatenate(
    [
      part[:, : columns * len(RATIOS)].reshape(-1)
      for part, (_, columns) in zip(parts, shapes, strict=True)
    ]
  )


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


def matched(
  rois: jax.Array, valid: jax.Array, boxes: jax.Array, exists: jax.Array, *, overlap: float
) -> RoIs:
  """RoIs of a cascade's next head, in their slots: all of them learn, and none is drawn.

  Args:
    rois: (R, 4), what the head before made of its RoIs.
    valid: (R,) bool.
    boxes, exists: of the objects.
    overlap: IoU with an object from which a RoI is positive.
  """
  valid = valid & ~box_ops.is_empty(rois)
  rule = Rule(positive=overlap, negative=overlap, minimum=overlap)
  assigned = assign(box_ops.iou(rois, boxes), valid, exists, rule)
  owner = jnp.maximum(assigned - 1, 0)
  sample = Sample(jnp.arange(len(rois)), valid, assigned > 0, owner)
  return RoIs(jnp.where(valid[:, None], rois, 0), sample)
