"""Augmentation of whole batches on the device: random erasing, mixup, cutmix.

What is drawn is a function of the key alone, whatever devices a batch lies on.
"""

import math

import jax
import jax.numpy as jnp

_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)  # drawn log-uniformly
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
  area = h * w * _between(uniform[:, :_ERASE_TRIES], *_ERASED_AREA)
  aspect = jnp.exp(_between(uniform[:, _ERASE_TRIES:-3], *map(math.log, _ERASED_ASPECT)))
  heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  fits = (heights < h) & (widths < w)
  first = fits.argmax(axis=1)[:, None]
  height, width = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (heights, widths))
  top = _below(uniform[:, -3], h - height + 1)
  left = _below(uniform[:, -2], w - width + 1)
  erased = fits.any(axis=1) & (uniform[:, -1] < probability)
  inside = _inside(h, w, top, left, top + height, left + width) & erased[:, None, None]
  return jnp.where(inside[..., None], jax.random.normal(noise, images.shape), images)


def mix(
  images: jax.Array,
  targets: jax.Array,
  rng: jax.Array,
  *,
  mixup: float,
  cutmix: float,
  switch_probability: float,
) -> tuple[jax.Array, jax.Array]:
  """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) with the reversed batch.

  As timm's `batch` mode: one draw for the whole batch. Cutmix's share is corrected to the part of
  the box that lies in the image.

  Args:
    images: (B, H, W, C).
    targets: (B, classes) probabilities.
    rng: PRNG key.
    mixup, cutmix: alpha of the Beta(alpha, alpha) that the share is drawn from; 0: never.
    switch_probability: of cutmix, where both are on.

  Returns:
    images and targets, mixed.
  """
  h, w = images.shape[1:3]
  places, share_key = jax.random.split(rng)
  uniform = jax.random.uniform(places, (3,))
  use_cutmix = uniform[0] < switch_probability if mixup and cutmix else jnp.asarray(cutmix > 0)
  alpha = jnp.where(use_cutmix, cutmix, mixup)
  share = jax.random.beta(share_key, alpha, alpha)
  other = images[::-1]
  mixed = images * share + other * (1 - share)
  if cutmix:
    height, width = (jnp.int32(side * jnp.sqrt(1 - share)) for side in (h, w))
    y, x = _below(uniform[1], h), _below(uniform[2], w)
    top, left = jnp.maximum(y - height // 2, 0), jnp.maximum(x - width // 2, 0)
    bottom, right = jnp.minimum(y + height // 2, h), jnp.minimum(x + width // 2, w)
    inside = _inside(h, w, top[None], left[None], bottom[None], right[None])[..., None]
    mixed = jnp.where(use_cutmix, jnp.where(inside, other, images), mixed)
    share = jnp.where(use_cutmix, 1 - (bottom - top) * (right - left) / (h * w), share)
  return mixed, targets * share + targets[::-1] * (1 - share)


def _between(uniform: jax.Array, low: float, high: float) -> jax.Array:
  return low + (high - low) * uniform


def _below(uniform: jax.Array, limit: jax.Array | int) -> jax.Array:
  """Uniform numbers in [0, 1) -> integers in [0, limit)."""
  return jnp.minimum(jnp.int32(uniform * limit), limit - 1)


def _inside(h: int, w: int, top, left, bottom, right) -> jax.Array:
  """(B,) box borders -> (B, H, W), True within the boxes."""
  rows, columns = jnp.arange(h)[:, None], jnp.arange(w)
  top, left, bottom, right = (side[:, None, None] for side in (top, left, bottom, right))
  return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
