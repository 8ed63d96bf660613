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


def denormalize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """Inverse of `normalize`, rounded and cut to uint8."""
  m, s = (_broadcast(statistic, images.shape[-1]) for statistic in (mean, std))
  return np.clip(np.rint((images * s + m) * 255), 0, 255).astype(np.uint8)
