"""Feature pyramid and heads of Mask R-CNN, as mmdetection has them.

Names of parameters are mmdetection's. Maps are (B, h, w, C), logits and deltas at least float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.detection.anchors import RATIOS
from hivit_jax.models.convolutions import BatchNorm, Upsample
from hivit_jax.ops import initializers
from hivit_jax.ops.modules import Linear
from hivit_jax.ops.precision import at_least_float32


def _xavier(size: int, inputs: int, outputs: int) -> Callable:
  return initializers.uniform(math.sqrt(6 / (size * size * (inputs + outputs))))


def _kaiming(size: int, outputs: int) -> Callable:
  return initializers.normal(math.sqrt(2 / (size * size * outputs)))


def mask_outside(x: jax.Array, own: jax.Array | None) -> jax.Array:
  """Zeros outside an image's own part of a map, so that a larger canvas changes nothing.

  Args:
    x: (B, h, w, C).
    own: (B, 2) rows and columns of each image, the upper left ones; None: all.
  """
  if own is None:
    return x
  rows = jnp.arange(x.shape[1]) < own[:, :1]  # (B, h)
  columns = jnp.arange(x.shape[2]) < own[:, 1:]
  return jnp.where((rows[:, :, None] & columns[:, None])[..., None], x, 0)


class Conv(nnx.Module):
  """A convolution of stride 1 and odd size, zeros around the borders.

  Args:
    size: of the kernel's sides.
    inputs, outputs: channels.
    init: of the kernel.
    dtype: of the computation.
    use_bias: there is a bias.
  """

  def __init__(
    self,
    size: int,
    inputs: int,
    outputs: int,
    *,
    init: Callable,
    rngs: nnx.Rngs,
    dtype: Any,
    use_bias: bool = True,
  ):
    self.dtype = dtype
    self.kernel = nnx.Param(init(rngs.params(), (size, size, inputs, outputs)))
    self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, h, w, inputs) -> (B, h, w, outputs)."""
    kernel = self.kernel[...].astype(self.dtype)
    x = jax.lax.conv_general_dilated(
      x.astype(self.dtype), kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class _Named(nnx.Module):
  """A convolution under the name that mmcv gives it, with the norm that may follow it."""

  def __init__(self, conv: Conv, norm: BatchNorm | None = None):
    self.conv = conv
    if norm is not None:
      self.bn = norm


class FPN(nnx.Module):
  """Feature pyramid (arXiv 1612.03144): P2..P5 and, as every second cell of P5, P6."""

  def __init__(self, inputs: Sequence[int], channels: int, *, rngs: nnx.Rngs, dtype: Any):
    def convs(size: int, widths: Sequence[int]) -> nnx.List:
      return nnx.List(
        _Named(Conv(size, c, channels, init=_xavier(size, c, channels), rngs=rngs, dtype=dtype))
        for c in widths
      )

    self.lateral_convs = convs(1, inputs)
    self.fpn_convs = convs(3, [channels] * len(inputs))

  def __call__(
    self, maps: Sequence[jax.Array], own: Sequence[jax.Array] | None = None
  ) -> tuple[jax.Array, ...]:
    """Maps of one width.

    Args:
      maps: (B, h, w, C), the finest first, each about half of the one before.
      own: for each level of the result (B, 2), see `mask_outside`; None: all is the image's.

    Returns:
      One more (B, h, w, channels) than there are maps.
    """
    sizes = [None] * len(maps) if own is None else own[:-1]
    merged = [block.conv(x) for block, x in zip(self.lateral_convs, maps, strict=True)]
    for i in range(len(merged) - 2, -1, -1):
      merged[i] = merged[i] + nearest(merged[i + 1], merged[i].shape[1:3])
    merged = [mask_outside(x, size) for x, size in zip(merged, sizes, strict=True)]
    outputs = [block.conv(x) for block, x in zip(self.fpn_convs, merged, strict=True)]
    return (*outputs, outputs[-1][:, ::2, ::2])


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """(B, h, w, C) -> (B, *size, C), each cell from the one at floor(i * h / H) of the source."""
  b, h, w, c = x.shape
  if size == (2 * h, 2 * w):
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, *size, c)
  rows, columns = (jnp.arange(to) * source // to for to, source in zip(size, (h, w), strict=True))
  return x[:, rows][:, :, columns]


class RPNHead(nnx.Module):
  """Objectness and deltas of every anchor, the same head on all levels."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: Any):
    options = {'init': initializers.normal(0.01), 'rngs': rngs}
    wide, anchors = at_least_float32(dtype), len(RATIOS)
    self.rpn_conv = Conv(3, channels, channels, dtype=dtype, **options)
    self.rpn_cls = Conv(1, channels, anchors, dtype=wide, **options)
    self.rpn_reg = Conv(1, channels, 4 * anchors, dtype=wide, **options)

  def __call__(self, x: jax.Array, own: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """One level.

    Args:
      x: (B, h, w, channels).
      own: (B, 2), see `mask_outside`.

    Returns:
      (B, h * w * 3) logits and (B, h * w * 3, 4) deltas, anchors as in `anchors.level_anchors`.
    """
    x = nnx.relu(self.rpn_conv(mask_outside(x, own)))
    return self.rpn_cls(x).reshape(len(x), -1), self.rpn_reg(x).reshape(len(x), -1, 4)


class BoxHead(nnx.Module):
  """Class and box of RoIs: four convolutions with BatchNorm, two layers.

  Args:
    channels: of the features and convolutions.
    hidden: width of the layer between.
    classes: without the background, which comes last.
    size: rows and columns of the features.
  """

  def __init__(
    self, channels: int, hidden: int, classes: int, *, size: int, rngs: nnx.Rngs, dtype: Any
  ):
    options = {'init': _kaiming(3, channels), 'use_bias': False, 'rngs': rngs, 'dtype': dtype}
    self.shared_convs = nnx.List(
      _Named(Conv(3, channels, channels, **options), BatchNorm(channels)) for _ in range(4)
    )
    inputs, wide = size * size * channels, at_least_float32(dtype)

    def layer(inputs: int, outputs: int, init: Callable, dtype: Any) -> Linear:
      return Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)

    self.shared_fcs = nnx.List([layer(inputs, hidden, _xavier(1, inputs, hidden), dtype)])
    self.fc_cls = layer(hidden, classes + 1, initializers.normal(0.01), wide)
    self.fc_reg = layer(hidden, 4 * classes, initializers.normal(0.001), wide)

  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Logits and deltas.

    Args:
      x: (R, size, size, channels) features of RoIs.
      valid: (R,) bool in training, see `BatchNorm`; None: not training.

    Returns:
      (R, classes + 1) logits and (R, classes, 4) deltas of each class.
    """
    for block in self.shared_convs:
      x = nnx.relu(block.bn(block.conv(x), train=valid is not None, valid=valid))
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channels first, as the weights' layout
    x = nnx.relu(self.shared_fcs[0](x))
    return self.fc_cls(x), self.fc_reg(x).reshape(len(x), -1, 4)


class MaskHead(nnx.Module):
  """Mask of a RoI's class: four convolutions, one twice as fine, logits."""

  def __init__(self, channels: int, classes: int, *, rngs: nnx.Rngs, dtype: Any):
    options = {'rngs': rngs, 'dtype': dtype}
    self.convs = nnx.List(
      _Named(Conv(3, channels, channels, init=_kaiming(3, channels), **options)) for _ in range(4)
    )
    self.upsample = Upsample(channels, **options)
    self.conv_logits = Conv(
      1, channels, classes, init=_kaiming(1, classes), rngs=rngs, dtype=at_least_float32(dtype)
    )

  def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Logits of one class for each RoI; the others' are not computed.

    Args:
      x: (R, size, size, channels) features of RoIs.
      labels: (R,) integers, the classes.

    Returns:
      (R, 2 * size, 2 * size).
    """
    for block in self.convs:
      x = nnx.relu(block.conv(x))
    x = nnx.relu(self.upsample(x)).astype(self.conv_logits.dtype)
    kernel, bias = self.conv_logits.kernel[...][0, 0], self.conv_logits.bias
    assert bias is not None
    out = jnp.einsum('rhwc,cr->rhw', x, kernel[:, labels].astype(x.dtype))
    return out + bias[...].astype(x.dtype)[labels][:, None, None]
