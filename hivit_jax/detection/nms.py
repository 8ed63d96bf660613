"""Non-maximum suppression as a fixed point."""

import jax
import jax.numpy as jnp

from hivit_jax.detection import boxes as box_ops


def nms(
  boxes: jax.Array,
  threshold: float,
  valid: jax.Array | None = None,
  groups: jax.Array | None = None,
) -> jax.Array:
  """Boxes that no better kept box overlaps too much, exactly as a greedy loop finds them.

  A box is kept where no kept box before it suppresses it. Whether the first k are kept is settled
  after k rounds, mostly after a few (3-8 for thousands of crowded boxes).

  Args:
    boxes: (N, 4), best first.
    threshold: IoU above which (not at which) the later one goes.
    valid: (N,) bool; others are not kept and suppress nothing.
    groups: (N,) integers; only boxes of one group suppress each other.

  Returns:
    (N,) bool, which are kept.
  """
  n = len(boxes)
  if valid is None:
    valid = jnp.ones(n, bool)
  common, union = box_ops.intersection_and_union(boxes[:, None], boxes[None])
  suppresses = (common > threshold * union) & (jnp.arange(n)[:, None] < jnp.arange(n)[None])
  if groups is not None:
    suppresses &= groups[:, None] == groups[None]

  def step(state):
    keep, _ = state
    found = valid & ~(suppresses & keep[:, None]).any(axis=0)
    return found, (found != keep).any()

  return jax.lax.while_loop(lambda state: state[1], step, (valid, jnp.asarray(True)))[0]
