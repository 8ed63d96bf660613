"""Which box learns which object, and which boxes learn at all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEITHER, BACKGROUND = -1, 0

# Equal in exact arithmetic, IoUs differ by rounding.
_TIE = 1e-6


class Rule(NamedTuple):
  """Thresholds of IoU.

  Attributes:
    positive: from which on a box takes the object that it overlaps most.
    negative: below which it is background.
    minimum: from which on an object also takes the boxes that overlap it most.
  """

  positive: float
  negative: float
  minimum: float


class Sample(NamedTuple):
  """Boxes that learn, in fixed slots: positives, then negatives, then empty ones.

  Attributes:
    index: (slots,) int32 positions of the boxes.
    valid: (slots,) bool; False: an empty slot.
    positive: (slots,) bool.
    object: (slots,) int32 index of a positive's object, 0 elsewhere.
  """

  index: jax.Array
  valid: jax.Array
  positive: jax.Array
  object: jax.Array


def assign(overlaps: jax.Array, valid: jax.Array, exists: jax.Array, rule: Rule) -> jax.Array:
  """Assigns an object, background or neither to each box (mmdetection's MaxIoUAssigner).

  An object whose best IoU reaches the minimum takes every box with that IoU, whatever these had;
  where two objects want a box the later one gets it. IoUs within 1e-6 of the best are the best.

  Args:
    overlaps: (N, M) IoU of boxes and objects.
    valid: (N,) bool; other boxes get neither and are nobody's best.
    exists: (M,) bool; other objects are empty slots.
    rule: thresholds.

  Returns:
    (N,) int32: -1 neither, 0 background, k the object k - 1.
  """
  overlaps = jnp.where(valid[:, None] & exists[None], overlaps, 0)
  best = overlaps.max(axis=1, initial=0)
  result = jnp.where(best < rule.negative, BACKGROUND, NEITHER)
  if overlaps.shape[1]:
    result = jnp.where(best >= rule.positive, overlaps.argmax(axis=1) + 1, result)
    own_best = overlaps.max(axis=0)
    takes = (overlaps >= own_best - _TIE) & (exists & (own_best >= rule.minimum))[None]
    takes = takes & valid[:, None]
    taken = jnp.where(takes, jnp.arange(1, overlaps.shape[1] + 1), 0).max(axis=1)
    result = jnp.where(taken > 0, taken, result)
  return jnp.where(valid, result, NEITHER).astype(jnp.int32)


def sample(assigned: jax.Array, priorities: jax.Array, positives: int, total: int) -> Sample:
  """Chooses boxes that learn: some positives, the rest negatives.

  Args:
    assigned: (N,) from `assign`.
    priorities: (N,) random numbers in [0, 1): the largest of either kind are chosen.
    positives: how many at most.
    total: how many of both.

  Returns:
    `total` slots.
  """
  count = len(assigned)
  of_positive = _chosen(assigned > 0, priorities, min(positives, count))
  of_negative = _chosen(assigned == BACKGROUND, priorities, min(total, count))
  n_positive, n_negative = of_positive[1], of_negative[1]
  slot = jnp.arange(total)
  positive = slot < n_positive
  negative_slot = jnp.clip(slot - n_positive, 0, len(of_negative[0]) - 1)
  index = jnp.where(
    positive,
    of_positive[0][jnp.minimum(slot, len(of_positive[0]) - 1)],
    of_negative[0][negative_slot],
  )
  valid = slot < n_positive + n_negative
  index = jnp.where(valid, index, 0)
  owner = jnp.where(positive, assigned[index] - 1, 0)
  return Sample(index.astype(jnp.int32), valid, positive, owner)


def _chosen(those: jax.Array, priorities: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
  """Positions of the marked with the largest priorities, best first, and how many there are."""
  _, index = jax.lax.top_k(jnp.where(those, priorities, -1.0), most)
  return index, jnp.minimum(those.sum(), most)
