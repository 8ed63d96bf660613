"""Augmentation of whole batches on the device: random erasing, mixup, cutmix.

All draws are a function of the key, whatever devices hold the batch. Mixup and cutmix are drawn for
groups of a batch: in the official runs, the images of one GPU and accumulation step.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)  # drawn log-uniformly
_ERASE_TRIES = 10


def random_erase(images: jax.Array, rng: jax.Array, probability: float) -> jax.Array:
  """Replaces a rectangle by noise (arXiv 1708.04896, timm's `pixel` mode).

  A rectangle covers 2 to 33 % of the image, its aspect ratio is drawn log-uniformly from 0.3 to
  3.3; the first of ten that fits is taken.

  Args:
    images: (B, H, W, C) normalised; every erased value becomes a standard normal number.
    rng: PRNG key.
    probability: that an image is erased at all.

  Returns:
    (B, H, W, C).
  """
  b, h, w, _ = images.shape
  boxes, noise = jax.random.split(rng)
  # One draw for all: every further one costs XLA's CPU backend a quarter of a second to compile.
  uniform = jax.random.uniform(boxes, (b, 2 * _ERASE_TRIES + 3))
  area = h * w * _between(uniform[:, :_ERASE_TRIES], *ERASED_AREA)
  aspect = jnp.exp(_between(uniform[:, _ERASE_TRIES:-3], *map(math.log, ERASED_ASPECT)))
  heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  fits = (heights < h) & (widths < w)
  first = fits.argmax(axis=1)[:, None]
  height, width = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (heights, widths))
  top = _below(uniform[:, -3], h - height + 1)
  left = _below(uniform[:, -2], w - width + 1)
  erased = fits.any(axis=1) & (uniform[:, -1] < probability)
  inside = _inside(h, w, top, top + height, left, left + width) & erased[:, None, None]
  return jnp.where(inside[..., None], jax.random.normal(noise, images.shape), images)


class Mix(NamedTuple):
  """How the images of each group are mixed with their partners.

  Attributes:
    share: (G,) of the image itself in the target, and with mixup in every pixel; in [0, 1].
    use_cutmix: (G,) bool: pixels in the box come from the partner, all others from the image.
    box: (G, 4) int32 top, bottom, left, right, within the image; mixup ignores it.
  """

  share: jax.Array
  use_cutmix: jax.Array
  box: jax.Array


def mix(
  images: jax.Array,
  targets: jax.Array,
  rng: jax.Array,
  *,
  mixup: float,
  cutmix: float,
  switch_probability: float,
  group: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899), as timm's `batch` mode.

  Args:
    images: (B, H, W, C).
    targets: (B, classes) probabilities.
    rng: PRNG key.
    mixup, cutmix: alpha of the Beta(alpha, alpha) that the share is drawn from; 0: never.
    switch_probability: of cutmix, where both are on.
    group: consecutive examples that share one draw and are partners, see `apply_mix`; None or 0:
      the whole batch.

  Returns:
    images and targets, mixed.
  """
  group = min(group or len(images), len(images))
  groups = -(-len(images) // group)
  places, share_key = jax.random.split(rng)
  uniform = jax.random.uniform(places, (3, groups))
  both = bool(mixup and cutmix)
  use_cutmix = uniform[0] < switch_probability if both else jnp.full(groups, cutmix > 0)
  alpha = jnp.where(use_cutmix, cutmix, mixup)
  share = jax.random.beta(share_key, alpha, alpha)
  h, w = images.shape[1:3]
  box, rest = cutmix_box(share, _below(uniform[1], h), _below(uniform[2], w), h, w)
  mixes = Mix(jnp.where(use_cutmix, rest, share), use_cutmix, box)
  return apply_mix(images, targets, mixes, group)


def cutmix_box(
  share: jax.Array, y: jax.Array, x: jax.Array, h: int, w: int
) -> tuple[jax.Array, jax.Array]:
  """The box that cutmix replaces: 1 - share of the image, less what lies outside of it.

  Args:
    share: (G,) in [0, 1], as drawn.
    y, x: (G,) int32 centres in pixels.
    h, w: sides of the images in pixels.

  Returns:
    (G, 4) int32 top, bottom, left, right; (G,) share of the image that is left.
  """
  half_h, half_w = (jnp.int32(side * jnp.sqrt(1 - share)) // 2 for side in (h, w))
  top, bottom = jnp.maximum(y - half_h, 0), jnp.minimum(y + half_h, h)
  left, right = jnp.maximum(x - half_w, 0), jnp.minimum(x + half_w, w)
  box = jnp.stack([top, bottom, left, right], axis=-1)
  return box, 1 - (bottom - top) * (right - left) / (h * w)


def apply_mix(
  images: jax.Array, targets: jax.Array, mixes: Mix, group: int
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image with its partner, the one at the mirrored place in its group.

  No example leaves its group: none travels between devices that hold whole groups.

  Args:
    images: (B, H, W, C).
    targets: (B, classes) probabilities.
    mixes: of the G = ceil(B / group) groups.
    group: consecutive examples that are mixed in one way, at most B; the last group may be smaller.

  Returns:
    images and targets, mixed.
  """
  whole = len(images) // group
  end = whole * group
  if end == len(images):
    return _mix_groups(images, targets, mixes, group)
  last = _mix_groups(
    images[end:], targets[end:], jax.tree.map(lambda x: x[whole:], mixes), len(images) - end
  )
  first = _mix_groups(images[:end], targets[:end], jax.tree.map(lambda x: x[:whole], mixes), group)
  return jnp.concatenate([first[0], last[0]]), jnp.concatenate([first[1], last[1]])


def _mix_groups(
  images: jax.Array, targets: jax.Array, mixes: Mix, size: int
) -> tuple[jax.Array, jax.Array]:
  """`apply_mix` for groups of one size."""
  shapes = images.shape, targets.shape
  # (G, size, ...): a batch that is split between groups stays split by its first axis.
  images, targets = (x.reshape(-1, size, *x.shape[1:]) for x in (images, targets))
  share = mixes.share[:, None, None]
  targets = targets * share + targets[:, ::-1] * (1 - share)
  share, use_cutmix = (x[:, None, None, None, None] for x in (mixes.share, mixes.use_cutmix))
  other = images[:, ::-1]
  inside = _inside(*images.shape[2:4], *mixes.box.T)[:, None, :, :, None]
  pasted = jnp.where(inside, other, images)
  mixed = jnp.where(use_cutmix, pasted, images * share + other * (1 - share))
  return mixed.reshape(shapes[0]), targets.reshape(shapes[1])


def _between(uniform: jax.Array, low: float, high: float) -> jax.Array:
  return low + (high - low) * uniform


def _below(uniform: jax.Array, limit: jax.Array | int) -> jax.Array:
  """Uniform numbers in [0, 1) -> integers in [0, limit)."""
  return jnp.minimum(jnp.int32(uniform * limit), limit - 1)


def _inside(h: int, w: int, top, bottom, left, right) -> jax.Array:
  """(B,) box borders -> (B, H, W), True within the boxes."""
  rows, columns = jnp.arange(h)[:, None], jnp.arange(w)
  top, bottom, left, right = (side[:, None, None] for side in (top, bottom, left, right))
  return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
