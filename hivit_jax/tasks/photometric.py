"""mmsegmentation's photometric distortion, on the device.

The pixels are equal to OpenCV's as XLA compiles this for CPUs; a compiler that rounds otherwise
may change one in thousands by one.

Brightness, contrast, saturation and hue change one after the other, the last two through an HSV of
8 bits, and every step cuts and truncates to uint8. PIL's HSV and contrast are other operations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BRIGHTNESS = 32.0  # largest change, of 255
_FACTORS = (0.5, 1.5)  # of contrast and saturation
_HUE = 18  # largest change, of 180; the upper end is left out
_SHIFT = 12  # bits after the point, in divisions by table


class Draw(NamedTuple):
  """What happens to each image of a batch: (B,) each; a step that is off changes nothing.

  Attributes:
    brightness: float32, added; NaN: off.
    contrast: float32, factor; NaN: off.
    contrast_first: bool, contrast comes before saturation and hue, not after them.
    saturation: float32, factor; NaN: off.
    hue: float32 integer, added; NaN: off.
  """

  brightness: Any
  contrast: Any
  contrast_first: Any
  saturation: Any
  hue: Any


def draw(rng: jax.Array, batch: int) -> Draw:
  """Each step is on for half of the images."""
  on, first, *keys = jax.random.split(rng, 6)
  uniform = lambda key, low, high: jax.random.uniform(key, (batch,), minval=low, maxval=high)  # noqa: E731
  amounts = (
    uniform(keys[0], -_BRIGHTNESS, _BRIGHTNESS),
    uniform(keys[1], *_FACTORS),
    uniform(keys[2], *_FACTORS),
    jax.random.randint(keys[3], (batch,), -_HUE, _HUE).astype(jnp.float32),
  )
  chosen = jax.random.bernoulli(on, shape=(batch, 4))
  brightness, contrast, saturation, hue = (
    jnp.where(chosen[:, i], amount, jnp.nan) for i, amount in enumerate(amounts)
  )
  return Draw(brightness, contrast, jax.random.bernoulli(first, shape=(batch,)), saturation, hue)


def distort(images: jax.Array, drawn: Draw) -> jax.Array:
  """(B, H, W, 3) uint8 RGB -> the same, changed as drawn."""
  brightness, contrast, first, saturation, hue = (
    jnp.asarray(x)[:, None, None, None] for x in drawn
  )
  x = images.astype(jnp.int32)
  x = _when(brightness, _cut(x + brightness), x)
  x = _when(jnp.where(first, contrast, jnp.nan), _cut(x * contrast), x)
  hsv = _to_hsv(x)
  h, s, v = (hsv[..., i : i + 1] for i in range(3))
  x = _when(saturation, _to_rgb(jnp.concatenate([h, _cut(s * saturation), v], axis=-1)), x)
  hsv = _to_hsv(x)
  turned = jnp.mod(hsv[..., :1] + jnp.nan_to_num(hue).astype(jnp.int32), 180)
  x = _when(hue, _to_rgb(jnp.concatenate([turned, hsv[..., 1:]], axis=-1)), x)
  x = _when(jnp.where(first, jnp.nan, contrast), _cut(x * contrast), x)
  return x.astype(jnp.uint8)


def _when(amount: jax.Array, changed: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.where(jnp.isnan(amount), x, changed)


def _cut(x: jax.Array) -> jax.Array:
  return jnp.clip(jnp.nan_to_num(x), 0, 255).astype(jnp.int32)


def _to_hsv(rgb: jax.Array) -> jax.Array:
  """(..., 3) integers in [0, 255] -> hue in [0, 179], saturation and value in [0, 255].

  In integers, with a rounding shift after a product with a rounded reciprocal, as OpenCV.
  """
  r, g, b = (rgb[..., i] for i in range(3))
  v = rgb.max(axis=-1)
  span = v - rgb.min(axis=-1)
  half = 1 << (_SHIFT - 1)
  saturation = (span * _reciprocal(255, v) + half) >> _SHIFT
  sector = jnp.where(v == r, g - b, jnp.where(v == g, b - r + 2 * span, r - g + 4 * span))
  hue = (sector * _reciprocal(30, span) + half) >> _SHIFT
  hue = jnp.where(hue < 0, hue + 180, hue)
  return jnp.stack([hue, saturation, v], axis=-1)


def _reciprocal(numerator: int, x: jax.Array) -> jax.Array:
  """numerator * 4096 / x, rounded half to even; 0 where x is."""
  table = [0] + [round((numerator << _SHIFT) / i) for i in range(1, 256)]
  return jnp.asarray(table, jnp.int32)[x]


def _to_rgb(hsv: jax.Array) -> jax.Array:
  """Inverse of `_to_hsv`, in float32 and truncated, as OpenCV.

  The shares are from tables: of two products with constants XLA makes one, which rounds otherwise.
  """
  h, s, v = (hsv[..., i] for i in range(3))
  shares = jnp.asarray(np.arange(256, dtype=np.float32) * np.float32(1 / 255))
  turns = np.arange(180, dtype=np.float32) * np.float32(6 / 180)
  s, v = shares[s], shares[v]
  fraction, sector = jnp.asarray(turns - np.floor(turns))[h], jnp.asarray(turns, jnp.int32)[h]
  p, q, t = v * (1 - s), v * (1 - s * fraction), v * (1 - s * (1 - fraction))
  pick = lambda *choices: jnp.select([sector == i for i in range(6)], choices)  # noqa: E731
  rgb = jnp.stack([pick(v, q, p, p, t, v), pick(t, v, v, q, p, p), pick(p, p, t, v, v, q)], axis=-1)
  return jnp.clip(rgb * 255, 0, 255).astype(jnp.int32)
