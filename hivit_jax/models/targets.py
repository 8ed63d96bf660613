"""What a masked autoencoder is to predict of a unit: its pixels, or features of SAR images.

SAR images are grey, and speckle multiplies their pixels, so ratios of sums describe edges better
than differences do. The features are those of SARATR-X's code and of its second version's.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models.masking import normalized_units, pixel_target
from hivit_jax.models.units import UNIT, split_units
from hivit_jax.ops.precision import widen

PIXELS, SARATRX, SARATRX_V2 = 'pixels', 'saratrx', 'saratrx_v2'
NAMES = (PIXELS, SARATRX, SARATRX_V2)

RADII = (9, 13, 17)
_OFFSET = 0.01
_RADII_V2 = (3, 5, 9, 13, 17)
_EPS = 1e-6


def check(target: str) -> None:
  """UserError unless it is one of `NAMES`."""
  if target not in NAMES:
    raise UserError(f'target="{target}" is not one of {", ".join(NAMES)}')


def width(target: str, channels: int) -> int:
  """Numbers of a unit to predict."""
  features = {PIXELS: channels, SARATRX: len(RADII), SARATRX_V2: 1}
  return UNIT * UNIT * features[target]


class Fusion(nnx.Module):
  """The learned weights of SARATR-X-v2's six features, in its code among the constants `hogs`."""

  def __init__(self):
    self.simple_weights = nnx.Param(jnp.zeros(1 + len(_RADII_V2)))


def saratrx(images: jax.Array) -> jax.Array:
  """Gradients by ratio at three scales.

  Args:
    images: (B, H, W, channels) grey pixels in [0, 1], the same in all channels.

  Returns:
    (B, N, 768): for each scale 16x16 numbers of a unit; together of mean 0 and variance 1.
  """
  grey = widen(images).mean(axis=-1)
  features = [_gradient(grey, radius, offset=_OFFSET) for radius in RADII]
  units = split_units(jnp.stack(features, axis=-1))  # (B, N, 16, 16, 3)
  units = jnp.moveaxis(units, -1, 2)
  return normalized_units(units.reshape(*units.shape[:2], -1))


def saratrx_v2(images: jax.Array, weights: jax.Array, normalize: bool) -> jax.Array:
  """A learned mean of neighbours and gradients by ratio at five scales.

  Args:
    images: (B, H, W, channels) normalised grey images, the same in all channels.
    weights: (6,), of which the softmax are the shares.
    normalize: each unit has mean 0 and variance 1.

  Returns:
    (B, N, 256).
  """
  features = features_v2(images)
  fused = jnp.einsum('i,i...->...', jax.nn.softmax(weights), jnp.stack(features))
  return pixel_target(fused[..., None], normalize)


def features_v2(images: jax.Array) -> list[jax.Array]:
  """The six features (B, H, W) of `saratrx_v2`, fine to coarse."""
  grey = jax.nn.sigmoid(widen(images).mean(axis=-1))
  padded = jnp.pad(grey, ((0, 0), (1, 1), (1, 1)), mode='reflect')
  around = _sums(_sums(padded, 1, 3), 2, 3) - grey + _EPS
  coarse = [
    jax.nn.sigmoid(_gradient(grey, radius, epsilon=_EPS, middle=False)) for radius in _RADII_V2
  ]
  return [around / (1 + around), *coarse]


def _gradient(
  grey: jax.Array, radius: int, *, offset: float = 0.0, epsilon: float = 0.0, middle: bool = True
) -> jax.Array:
  """Length of the gradient of logarithms: (B, H, W) -> (B, H, W).

  Its parts are log(left / right) and log(up / down), of sums over the halves of a window.

  Args:
    grey: (B, H, W).
    radius: of the window, of 2 * radius + 1 pixels a side; beyond the border is the mirror image.
    offset: added to each pixel.
    epsilon: added to each sum.
    middle: both halves have the window's middle line.
  """
  pad = ((0, 0), (radius, radius), (radius, radius))
  x = jnp.pad(grey, pad, mode='reflect') + offset
  squares = 0.0
  for along, across in ((2, 1), (1, 2)):
    lines = _sums(x, across, 2 * radius + 1)
    halves = _sums(lines, along, radius + middle)
    first, last = (
      jax.lax.slice_in_dim(halves, start, start + grey.shape[along], axis=along) + epsilon
      for start in (0, radius + 1 - middle)
    )
    squares += jnp.square(jnp.log(first / last))
  # The derivative of a root is infinite at 0, and nothing trains the images.
  return jnp.sqrt(jax.lax.stop_gradient(squares))


def _sums(x: jax.Array, axis: int, count: int) -> jax.Array:
  """Sums of `count` neighbours along an axis of (B, H, W), which gets shorter by count - 1."""
  window = [1, 1, 1]
  window[axis] = count
  zero = jnp.zeros((), x.dtype)
  return jax.lax.reduce_window(x, zero, jax.lax.add, window, (1, 1, 1), 'VALID')
