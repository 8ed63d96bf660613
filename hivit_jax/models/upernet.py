"""UPerNet (arXiv 1807.10221): a class for every pixel, as in mmsegmentation.

A pooling pyramid on the coarsest map, a feature pyramid down to the finest, all of them joined at a
quarter of the image's resolution. In training, a small head on the third map has a loss of its own.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models import resize
from hivit_jax.models.convolutions import ConvModule, PixelClassifier
from hivit_jax.models.segmenter_settings import HeadsSettings
from hivit_jax.ops.choice import FAST, Ops
from hivit_jax.ops.modules import batch_norm

POOL_SCALES = (1, 2, 3, 6)  # cells a side of the pooling pyramid
_AUXILIARY_LEVEL = 3
_STRIDE = 4  # pixels of an image along a side of what logits are for


class _Pool(nnx.Module):
  """Has no parameters; in the reference the first part of each branch of the pooling pyramid."""


class UPerHead(nnx.Module):
  """UPerNet's head.

  Args:
    inputs: channels of the maps, finest first.
    channels: of everything in the head.
    classes: of a pixel.
    rate: of the dropout before the classifier.
  """

  ops: Ops = FAST

  def __init__(
    self,
    inputs: Sequence[int],
    channels: int,
    classes: int,
    *,
    rate: float,
    rngs: nnx.Rngs,
    dtype: Any,
  ):
    options = {'rngs': rngs, 'dtype': dtype}
    self.conv_seg = PixelClassifier(channels, classes, rate=rate, **options)
    self.psp_modules = nnx.List(
      nnx.List([_Pool(), ConvModule(inputs[-1], channels, 1, **options)]) for _ in POOL_SCALES
    )
    joined = inputs[-1] + len(POOL_SCALES) * channels
    self.bottleneck = ConvModule(joined, channels, 3, **options)
    self.lateral_convs = nnx.List(ConvModule(c, channels, 1, **options) for c in inputs[:-1])
    self.fpn_convs = nnx.List(ConvModule(channels, channels, 3, **options) for _ in inputs[:-1])
    self.fpn_bottleneck = ConvModule(len(inputs) * channels, channels, 3, **options)

  def __call__(
    self, maps: Sequence[jax.Array], dropout_noise: jax.Array | None = None, *, train: bool
  ) -> jax.Array:
    """Logits at the resolution of the finest map.

    Args:
      maps: (B, h, w, C), finest first.
      dropout_noise: (B, channels) uniform numbers; None: no dropout.
      train: BatchNorm takes the batch's statistics and updates its own.

    Returns:
      (B, h, w, classes) float32.
    """
    return self.conv_seg(self.fused(maps, train=train), dropout_noise)

  def fused(self, maps: Sequence[jax.Array], *, train: bool) -> jax.Array:
    """(B, h, w, channels), before the classifier."""
    laterals = [conv(x, train=train) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
    laterals.append(self.pyramid(maps[-1], train=train))
    for i in reversed(range(len(laterals) - 1)):
      laterals[i] += resize.bilinear(laterals[i + 1], laterals[i].shape[1:3])
    outs = [conv(x, train=train) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
    kernel = self.fpn_bottleneck.conv.kernel[...]
    x = _convolve_joined([*outs, laterals[-1]], kernel, self.ops)
    return self.fpn_bottleneck.activate(x, train=train)

  def pyramid(self, x: jax.Array, *, train: bool) -> jax.Array:
    """The coarsest map with what its surroundings are at four scales: (B, h, w, channels)."""
    parts = [x]
    for scale, branch in zip(POOL_SCALES, self.psp_modules, strict=True):
      pooled = branch[1](resize.adaptive_mean(x, scale), train=train)
      parts.append(resize.bilinear(pooled, x.shape[1:3]))
    return self.bottleneck(jnp.concatenate(parts, axis=-1), train=train)


@functools.partial(jax.checkpoint, static_argnums=2)
def _convolve_joined(maps: Sequence[jax.Array], kernel: jax.Array, ops: Ops) -> jax.Array:
  """A convolution of all maps, resized to the finest and joined along their channels.

  Computed as a sum of as many convolutions: nothing is joined, and the backward pass, which resizes
  again, keeps only the small maps. At the published width that is most of a head's memory.
  """
  size = maps[0].shape[1:3]
  kernels = jnp.split(kernel, len(maps), axis=2)
  parts = [
    ops.convolve(resize.bilinear(x, size), part) for x, part in zip(maps, kernels, strict=True)
  ]
  return functools.reduce(jnp.add, parts)


class FCNHead(nnx.Module):
  """One convolution and a classifier on one map: the auxiliary head."""

  def __init__(
    self, inputs: int, channels: int, classes: int, *, rate: float, rngs: nnx.Rngs, dtype: Any
  ):
    options = {'rngs': rngs, 'dtype': dtype}
    self.conv_seg = PixelClassifier(channels, classes, rate=rate, **options)
    self.convs = nnx.List([ConvModule(inputs, channels, 3, **options)])

  def __call__(
    self, x: jax.Array, dropout_noise: jax.Array | None = None, *, train: bool
  ) -> jax.Array:
    """(B, h, w, inputs) -> (B, h, w, classes) float32; the rest as for `UPerHead`."""
    return self.conv_seg(self.convs[0](x, train=train), dropout_noise)


class LinearHead(nnx.Module):
  """BatchNorm without scale and bias, then a linear classifier, on some of the maps.

  Like MAE's linear probe (arXiv 2111.06377, appendix A), but for pixels. One classifier takes the
  channels of all maps; its share of a map is computed before the map is enlarged.

  Args:
    inputs: channels of all maps, finest first.
    levels: maps that are used, counted from 1.
    classes: of a pixel.
    scale: logits for each cell of the finest map, along a side.
  """

  ops: Ops = FAST

  def __init__(
    self,
    inputs: Sequence[int],
    levels: Sequence[int],
    classes: int,
    *,
    scale: int,
    rngs: nnx.Rngs,
    dtype: Any,
  ):
    self.levels, self.scale = tuple(sorted(levels)), scale
    widths = [inputs[level - 1] for level in self.levels]
    for level, width in zip(self.levels, widths, strict=True):
      setattr(self, f'norm{level}', batch_norm(width, rngs=rngs))
    self.conv_seg = PixelClassifier(sum(widths), classes, rate=0.0, rngs=rngs, dtype=dtype)

  def __call__(
    self, maps: Sequence[jax.Array], dropout_noise: jax.Array | None = None, *, train: bool
  ) -> jax.Array:
    """(B, h, w, classes) float32; arguments as for `UPerHead`, but no dropout."""
    del dropout_noise
    _, height, width, _ = maps[0].shape
    size = height * self.scale, width * self.scale
    kernel, logits, start = self.conv_seg.kernel[...][0, 0], self.conv_seg.bias[...], 0
    for level in self.levels:
      x = getattr(self, f'norm{level}')(maps[level - 1], use_running_average=not train)
      x = x.astype(self.conv_seg.dtype)
      own = kernel[start : start + x.shape[-1]]
      start += x.shape[-1]
      part = self.ops.linear(x.reshape(-1, x.shape[-1]), own, None).reshape(*x.shape[:-1], -1)
      logits = logits + resize.bilinear(part, size)
    return logits


class Segmenter(nnx.Module):
  """An encoder with UPerNet or a linear classifier.

  (B, H, W, channels) images -> (B, H/4, W/4, classes) logits.
  """

  def __init__(self, settings: HeadsSettings, *, rngs: nnx.Rngs):
    self.settings = settings
    self.image_size, self.channels = settings.image_size, settings.channels
    self.num_classes = settings.num_classes
    self.backbone = settings.make_encoder(rngs)
    inputs = [info.channels for info in self.backbone.feature_info]
    options = {'rngs': rngs, 'dtype': settings.dtype}
    classes, levels, rate = settings.num_classes, settings.linear_levels, settings.dropout_rate
    self.neck = None if levels else settings.make_neck(rngs)
    if levels:
      scale = self.backbone.feature_info[0].stride // _STRIDE
      self.decode_head = LinearHead(inputs, levels, classes, scale=scale, **options)
    else:
      self.decode_head = UPerHead(inputs, settings.head_channels, classes, rate=rate, **options)
    width, second = inputs[_AUXILIARY_LEVEL - 1], 0 if levels else settings.auxiliary_channels
    self.auxiliary_head = FCNHead(width, second, classes, rate=rate, **options) if second else None

  @property
  def drop_path_rates(self) -> tuple[float, ...]:
    """Of the encoder's blocks."""
    return self.backbone.drop_path_rates

  def drop_path_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """See `Encoder.drop_path_noise`."""
    return self.backbone.drop_path_noise(rng, batch)

  def dropout_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide which channels a batch drops: (batch, channels of the heads)."""
    settings = self.settings
    return jax.random.uniform(rng, (batch, settings.head_channels + settings.auxiliary_channels))

  def __call__(self, images: jax.Array) -> jax.Array:
    """Logits of the main head, by the running statistics.

    Args:
      images: normalised, of `image_size`. HiViT takes any multiple of 16 from 32 on; with relative
        position bias, another size is another function than the published one.

    Returns:
      (B, H/4, W/4, classes) float32.
    """
    return self.decode_head(self._maps(images, None, train=False), train=False)

  def _maps(self, images: jax.Array, drop_path_noise: Any, *, train: bool) -> Sequence[jax.Array]:
    """Of the levels, finest first."""
    maps = self.backbone(images, drop_path_noise=drop_path_noise)
    return maps if self.neck is None else self.neck(maps, train=train)

  def heads(
    self,
    images: jax.Array,
    *,
    drop_path_noise: jax.Array | None = None,
    dropout_noise: jax.Array | None = None,
    train: bool = True,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Logits of both heads, for training.

    Args:
      images: as for `__call__`.
      drop_path_noise, dropout_noise: from the methods of these names; None: off.
      train: BatchNorm takes the batch's statistics and updates its own.

    Returns:
      (B, H/4, W/4, classes) and, where there is an auxiliary head, (B, H/16, W/16, classes).
    """
    maps = self._maps(images, drop_path_noise, train=train)
    first = second = None
    if dropout_noise is not None:
      first, second = jnp.split(dropout_noise, [self.settings.head_channels], axis=1)
    logits = self.decode_head(maps, first, train=train)
    if self.auxiliary_head is None:
      return logits, None
    return logits, self.auxiliary_head(maps[_AUXILIARY_LEVEL - 1], second, train=train)
