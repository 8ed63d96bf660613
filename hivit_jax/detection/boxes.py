"""Arithmetic of boxes (x1, y1, x2, y2)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

MAX_LOG_RATIO = abs(math.log(16 / 1000))  # of the sides of a decoded box to the box it starts from
_TINY = 1e-6  # pixels^2, the least union and hull that are divided by


def area(boxes: jax.Array) -> jax.Array:
  """(..., 4) -> (...)."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def clip(boxes: jax.Array, size: jax.Array | Sequence[int]) -> jax.Array:
  """Cuts boxes (..., 4) to an image of `size` (height, width)."""
  limits = jnp.asarray(size, boxes.dtype)[jnp.array([1, 0, 1, 0])]
  return jnp.minimum(jnp.maximum(boxes, 0), limits)


def is_empty(boxes: jax.Array) -> jax.Array:
  """Whether a box has no inside: (..., 4) -> (...) bool."""
  return (boxes[..., 2] <= boxes[..., 0]) | (boxes[..., 3] <= boxes[..., 1])


def encode(boxes: jax.Array, targets: jax.Array, stds: Sequence[float]) -> jax.Array:
  """The way from boxes to targets as deltas.

  Args:
    boxes: (..., 4) not empty.
    targets: (..., 4) not empty.
    stds: of the four deltas, which are divided by them.

  Returns:
    (..., 4): shifts of the centre in sides of the box, logarithms of the ratios of the sides.
  """
  center, side = _center_and_side(boxes)
  target_center, target_side = _center_and_side(targets)
  deltas = [(target_center - center) / side, jnp.log(target_side / side)]
  return jnp.concatenate(deltas, axis=-1) / jnp.asarray(stds, boxes.dtype)


def decode(boxes: jax.Array, deltas: jax.Array, stds: Sequence[float]) -> jax.Array:
  """Inverse of `encode`, (..., 4); the sides change at most by a factor of 62.5."""
  center, side = _center_and_side(boxes)
  deltas = deltas * jnp.asarray(stds, deltas.dtype)
  growth = jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO)
  center, half = center + deltas[..., :2] * side, 0.5 * side * jnp.exp(growth)
  return jnp.concatenate([center - half, center + half], axis=-1)


def _center_and_side(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
  return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def intersection_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Areas in common and in total; (..., 4) and (..., 4), broadcast -> (...) each."""
  sides = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
  sides = jnp.maximum(sides, 0)
  common = sides[..., 0] * sides[..., 1]
  return common, area(a) + area(b) - common


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Intersection over union of each with each: (N, 4), (M, 4) -> (N, M)."""
  common, union = intersection_and_union(a[:, None], b[None])
  return common / jnp.maximum(union, _TINY)


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Generalised IoU (arXiv 1902.09630) of pairs: (..., 4), (..., 4) -> (...) in [-1, 1]."""
  common, union = intersection_and_union(a, b)
  union = jnp.maximum(union, _TINY)
  low, high = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
  sides = jnp.maximum(high - low, 0)
  hull = jnp.maximum(sides[..., 0] * sides[..., 1], _TINY)
  return common / union - (hull - union) / hull
