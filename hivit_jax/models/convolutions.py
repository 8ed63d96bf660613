"""Convolutions with BatchNorm, as the heads of mmsegmentation and mmdetection have them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models.layers import torch_conv_init
from hivit_jax.ops import initializers
from hivit_jax.ops.choice import FAST, Ops
from hivit_jax.ops.precision import at_least_float32, widen

_EPSILON = 1e-5
_MOMENTUM = 0.1  # share of the batch in the new running statistics


class BatchNorm(nnx.Module):
  """BatchNorm over all but the last axis, with PyTorch's running statistics.

  Unlike `nnx.BatchNorm`, the running variance is the unbiased one, n / (n - 1) times that of the
  batch: 3 % more where a map has one place and a batch 32 examples. Statistics are at least float32
  and over the whole batch, on however many devices.
  """

  def __init__(self, features: int):
    self.scale = nnx.Param(jnp.ones(features))
    self.bias = nnx.Param(jnp.zeros(features))
    self.mean = nnx.BatchStat(jnp.zeros(features))
    self.var = nnx.BatchStat(jnp.ones(features))

  def __call__(self, x: jax.Array, *, train: bool, valid: jax.Array | None = None) -> jax.Array:
    """(B, ..., features) -> the same.

    Args:
      x: what to normalise.
      train: by the batch's statistics, of which the running ones take a share.
      valid: (B,) bool; the other rows are empty slots, which do not count. None: all do.
    """
    wide = widen(x)
    if train:
      axes = tuple(range(x.ndim - 1))
      if valid is None:
        mean = wide.mean(axes)
        var = jnp.square(wide - mean).mean(axes)
        count = math.prod(x.shape[:-1])
      else:
        weight = valid.astype(wide.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        count = jnp.maximum(weight.sum() * math.prod(x.shape[1:-1]), 2)
        mean = (wide * weight).sum(axes) / count
        var = (jnp.square(wide - mean) * weight).sum(axes) / count
      for statistic, new in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
        old = statistic[...]
        statistic[...] = (old + _MOMENTUM * (new - old)).astype(old.dtype)
    else:
      mean, var = self.mean[...], self.var[...]
    scale = jax.lax.rsqrt(var + _EPSILON) * self.scale[...]
    return ((wide - mean) * scale + self.bias[...]).astype(x.dtype)


class Conv(nnx.Module):
  """A convolution of stride 1 without bias, zeros around the borders.

  Args:
    inputs, outputs: channels.
    size: of the kernel, odd.
  """

  ops: Ops = FAST

  def __init__(self, inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs, dtype: Any):
    init = initializers.normal(math.sqrt(2 / (outputs * size * size)))  # Kaiming, of the outputs
    self.kernel = nnx.Param(init(rngs.params(), (size, size, inputs, outputs)))
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, inputs) -> (B, H, W, outputs)."""
    x, kernel = x.astype(self.dtype), self.kernel[...]
    if kernel.shape[:2] != (1, 1):
      return self.ops.convolve(x, kernel)
    out = self.ops.linear(x.reshape(-1, x.shape[-1]), kernel[0, 0], None)
    return out.reshape(*x.shape[:-1], -1)


class ConvModule(nnx.Module):
  """Convolution, BatchNorm, ReLU."""

  def __init__(self, inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs, dtype: Any):
    self.conv = Conv(inputs, outputs, size, rngs=rngs, dtype=dtype)
    self.bn = BatchNorm(outputs)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """(B, H, W, inputs) -> (B, H, W, outputs); `train` is for `BatchNorm`."""
    return self.activate(self.conv(x), train=train)

  def activate(self, x: jax.Array, *, train: bool) -> jax.Array:
    """What follows the convolution."""
    return nnx.relu(self.bn(x, train=train))


class Upsample(nnx.Module):
  """Transposed convolution whose stride is its size, 2: a product.

  The kernel is (2, 2, outputs, inputs): reordered like that of a convolution it has PyTorch's
  layout of a transposed one, (inputs, outputs, 2, 2).
  """

  def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: Any):
    self.dtype = dtype
    init = initializers.normal(math.sqrt(2 / (4 * channels)))  # Kaiming, of the outputs
    self.kernel = nnx.Param(init(rngs.params(), (2, 2, channels, channels)))
    self.bias = nnx.Param(jnp.zeros(channels))

  def __call__(self, x: jax.Array) -> jax.Array:
    """(R, h, w, C) -> (R, 2 * h, 2 * w, C)."""
    r, h, w, _ = x.shape
    kernel = self.kernel[...].astype(self.dtype)
    out = jnp.einsum('rhwi,aboi->rhawbo', x.astype(self.dtype), kernel)
    return out.reshape(r, 2 * h, 2 * w, -1) + self.bias[...].astype(self.dtype)


class PixelClassifier(nnx.Module):
  """Dropout of whole channels, then logits for each place, in at least float32."""

  ops: Ops = FAST

  def __init__(self, inputs: int, classes: int, *, rate: float, rngs: nnx.Rngs, dtype: Any):
    init = torch_conv_init(inputs)
    self.kernel = nnx.Param(init(rngs.params(), (1, 1, inputs, classes)))
    self.bias = nnx.Param(init(rngs.params(), (classes,)))
    self.rate = rate
    # Not in bfloat16, in which several logits would be the largest.
    self.dtype = at_least_float32(dtype)

  def __call__(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """(B, H, W, inputs) -> (B, H, W, classes).

    Args:
      x: the maps.
      noise: (B, inputs) uniform in [0, 1), one number a channel; None: no dropout.
    """
    x = x.astype(self.dtype)
    if noise is not None:
      keep = 1.0 - self.rate
      x = x * jnp.where(noise < keep, 1.0 / keep, 0.0).astype(x.dtype)[:, None, None]
    out = self.ops.linear(x.reshape(-1, x.shape[-1]), self.kernel[...][0, 0], self.bias[...])
    return out.reshape(*x.shape[:-1], -1)
