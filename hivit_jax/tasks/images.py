"""From pixels to the input of models, on the device, and back."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def _broadcast(statistic: Sequence[float], channels: int) -> np.ndarray:
  values = np.asarray(statistic, np.float32)
  # Sets with other channel counts than the statistics' get their average, as timm does.
  return values if len(values) == channels else np.full(channels, values.mean(), np.float32)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """(..., C) uint8 -> float32 `(x / 255 - mean) / std`."""
  m, s = (_broadcast(statistic, images.shape[-1]) for statistic in (mean, std))
  return images.astype(jnp.float32) * (1 / (255 * s)) - m / s


def normalize_padded(
  images: jax.Array, sizes: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """`normalize` of (B, H, W, C), and 0 around pictures: `sizes` (B, 2) are rows and columns."""
  x = normalize(images, mean, std)
  rows, columns = (jnp.arange(side) < sizes[:, i : i + 1] for i, side in enumerate(x.shape[1:3]))
  return jnp.where((rows[:, :, None] & columns[:, None])[..., None], x, 0)


def denormalize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """Inverse of `normalize`, rounded and cut to uint8."""
  m, s = (_broadcast(statistic, images.shape[-1]) for statistic in (mean, std))
  return np.clip(np.rint((images * s + m) * 255), 0, 255).astype(np.uint8)
