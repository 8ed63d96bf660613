"""Which units an autoencoder sees, and what it should predict (MAE, arXiv 2111.06377)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import core

from hivit_jax.errors import UserError
from hivit_jax.models.units import split_units
from hivit_jax.ops.precision import widen

NORM_PIX_EPS = 1e-6


@struct.dataclass
class MAEOutput:
  """The output of a masked autoencoder.

  Attributes:
    loss: () float32, mean squared error over the removed units.
    pred: (B, N, 16 * 16 * channels) float32, pixels in (row, column, channel) order, in the space
      of the target: normalised per unit when `norm_pix_loss` is on.
    mask: (B, N) float32, 1 = removed.
    ids_keep: (B, K) int32, positions of the kept units.
    ids_restore: (B, N) int32, for each unit its place in the shuffled sequence.
  """

  loss: jax.Array
  pred: jax.Array
  mask: jax.Array
  ids_keep: jax.Array
  ids_restore: jax.Array


def kept_units(units: int, mask_ratio: float) -> int:
  """Number of units that a mask ratio keeps; UserError when that is none or all of them."""
  if not 0 < mask_ratio < 1:
    raise UserError(f'mask_ratio must lie strictly between 0 and 1, got {mask_ratio}')
  keep = int(units * (1 - mask_ratio))
  if not 0 < keep < units:
    raise UserError(f'mask_ratio {mask_ratio} keeps {keep} of {units} units: need at least one')
  return keep


def random_masking(noise: jax.Array, keep: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Keeps the units with the smallest noise.

  Args:
    noise: (B, N), one number per unit.
    keep: K, units to keep.

  Returns:
    ids_keep (B, K) in order of rising noise, ids_restore (B, N), mask (B, N; 1 = removed).
  """
  ids_shuffle = jnp.argsort(noise, axis=1)
  ids_restore = jnp.argsort(ids_shuffle, axis=1)
  return ids_shuffle[:, :keep], ids_restore, (ids_restore >= keep).astype(jnp.float32)


def mask_to_noise(mask: np.ndarray, units: int) -> tuple[np.ndarray, int]:
  """Turns a chosen mask into the noise that produces it.

  Args:
    mask: (B, N), 1 or True = removed; concrete (not traced), the same count in every row.
    units: N.

  Returns:
    noise (B, N) for `random_masking`, which sorts stably, and the number of kept units.

  Raises:
    ValueError: the mask is traced.
    UserError: it is no such mask.
  """
  if isinstance(mask, core.Tracer):
    raise ValueError('mask must be concrete: inside jit its count of kept units would be unknown')
  mask = np.asarray(mask, np.float32)
  if mask.ndim != 2 or mask.shape[1] != units:
    raise UserError(f'mask must be (B, {units}), one number per unit, got shape {mask.shape}')
  other = mask[~np.isin(mask, (0, 1))]
  if other.size:
    raise UserError(f'mask must be 1 (removed) or 0 (kept) everywhere, got {other[0]}')
  counts = np.unique((mask == 0).sum(axis=1))
  if len(counts) != 1 or not 0 < counts[0] < units:
    raise UserError(
      f'mask must keep the same number of units, 1 to {units - 1}, in every row, keeps '
      + ' or '.join(map(str, counts))
    )
  return mask, int(counts[0])


def unit_moments(target: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and *unbiased* variance per unit: (B, N, P) -> two of (B, N, 1)."""
  return target.mean(axis=-1, keepdims=True), target.var(axis=-1, ddof=1, keepdims=True)


def pixel_target(images: jax.Array, norm_pix_loss: bool) -> jax.Array:
  """(B, H, W, channels) normalised images -> (B, N, 16 * 16 * channels) what `pred` should be."""
  units = split_units(widen(images))
  target = units.reshape(*units.shape[:2], -1)
  return normalized_units(target) if norm_pix_loss else target


def normalized_units(target: jax.Array) -> jax.Array:
  """(B, N, P), each unit with mean 0 and variance 1, see `unit_moments`."""
  mean, variance = unit_moments(target)
  return (target - mean) * jax.lax.rsqrt(variance + NORM_PIX_EPS)
