"""From pixels to the input of models, on the device, and back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_STRETCHED = (2, 98)  # percentiles that are shown as black and white


def _broadcast(statistic: Sequence[float], channels: int) -> np.ndarray:
  values = np.asarray(statistic, np.float32)
  # Sets with other channel counts than the statistics' get their average, as timm does.
  return values if len(values) == channels else np.full(channels, values.mean(), np.float32)


def full_range(dtype: Any) -> int:
  """What stands for 1 in pixels of a type."""
  return int(np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else 1


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """(..., C) -> float32 `(x / range - mean) / std`.

  The range is that of an integer type, 255 of uint8; floats are taken as they are.
  """
  m, s = (_broadcast(statistic, images.shape[-1]) for statistic in (mean, std))
  return images.astype(jnp.float32) * (1 / (full_range(images.dtype) * s)) - m / s


def normalize_padded(
  images: jax.Array, sizes: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """`normalize` of (B, H, W, C), and 0 around pictures: `sizes` (B, 2) are rows and columns."""
  x = normalize(images, mean, std)
  rows, columns = (jnp.arange(side) < sizes[:, i : i + 1] for i, side in enumerate(x.shape[1:3]))
  return jnp.where((rows[:, :, None] & columns[:, None])[..., None], x, 0)


def denormalize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """Inverse of `normalize` up to the range: in [0, 1] where integers were."""
  m, s = (_broadcast(statistic, images.shape[-1]) for statistic in (mean, std))
  return images * s + m


def scaled(images: np.ndarray) -> np.ndarray:
  """(..., C) as stored -> float32, integers in [0, 1]: what `mean` and `std` are for."""
  return images / np.float32(full_range(images.dtype))


def as_bytes(images: np.ndarray, channels: Sequence[int] | None = None) -> np.ndarray:
  """(..., C) as stored -> (..., 3 or 1) uint8 of the channels that are shown, see `Display.of`."""
  return Display.of(images, channels)(scaled(images))


@dataclasses.dataclass(frozen=True)
class Display:
  """How images of any kind are shown as bytes.

  Attributes:
    channels: indices of the three that are red, green and blue, or of the one that is grey.
    low, high: scaled pixels that become black and white, of each of these or of all.
  """

  channels: Sequence[int]
  low: Any = 0.0
  high: Any = 1.0

  @classmethod
  def of(cls, images: np.ndarray, channels: Sequence[int] | None = None) -> 'Display':
    """For images (..., C) as stored: bytes as they are, other types stretched.

    Args:
      images: decide the limits, the same for all.
      channels: three or one, counted from 1; None: the first three, or the first.
    """
    count = 3 if images.shape[-1] >= 3 else 1
    chosen = [c - 1 for c in channels] if channels else list(range(count))
    if images.dtype == np.uint8:
      return cls(chosen)
    pixels = scaled(images[..., chosen]).reshape(-1, len(chosen))
    low, high = np.percentile(pixels, _STRETCHED, axis=0)
    return cls(chosen, low, np.where(high > low, high, low + 1))

  def __call__(self, pixels: np.ndarray) -> np.ndarray:
    """(..., C) scaled pixels -> (..., 3 or 1) uint8."""
    shown = (pixels[..., self.channels] - self.low) / (self.high - self.low)
    return np.clip(np.rint(shown * 255), 0, 255).astype(np.uint8)
