"""What a model computes on its way: the feature maps of all levels, and attention."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx

from hivit_jax.models.backbone import Backbone
from hivit_jax.models.encoder import Encoder
from hivit_jax.models.itpn import ITPNBackbone
from hivit_jax.models.swin_backbone import SwinBackbone
from hivit_jax.models.units import UNIT
from hivit_jax.models.vit_pyramid import ViTBackbone
from hivit_jax.ops import attention


class Inside(NamedTuple):
  """What an encoder computed of images.

  Attributes:
    maps: (B, h, w, C) of each level of `feature_info`.
    attention: softmax of each block that has one, in their order, (B, heads, N, N), class token
      first; (B, windows, heads, n, n) where a block attends within windows. Rows are what attends.
  """

  maps: tuple[jax.Array, ...]
  attention: tuple[jax.Array, ...]


def encoder_of(model: Any) -> Any:
  """The encoder of a model: that of a segmenter, detector or SimMIM, else the model itself."""
  encoder = getattr(model, 'backbone', getattr(model, 'encoder', model))
  assert isinstance(encoder, Encoder), type(encoder)
  return encoder


def takes_any_size(model: Any) -> bool:
  """Whether `look` takes images of other sizes than the model's."""
  return hasattr(encoder_of(model), 'features')


def grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
  """(rows, columns) of the tokens of the last stage, for images of (height, width) pixels."""
  stride = getattr(encoder_of(model).settings, 'stride', UNIT)
  return size[0] // stride, size[1] // stride


def look(model: Any, images: jax.Array) -> Inside:
  """Encodes images and keeps what is computed on the way.

  Under `jax.jit`, what the caller does not return is not computed: attention to all units of a
  large image takes gigabytes.

  Args:
    model: from `create_model`; it stays as it is.
    images: (B, H, W, channels), normalised. Models with `features` take every multiple of 32
      pixels, others their own size.

  Raises:
    UserError: images of another size, type or other channels.
  """
  encoder = encoder_of(nnx.merge(*nnx.split(model)))
  seen: list[jax.Array] = []

  def attend(qkv: jax.Array, heads: int, bias: jax.Array | None = None) -> jax.Array:
    def watched(q, k, v, bias):
      seen.append(attention.weights(q, k, bias))
      return attention.plain(q, k, v, bias)

    return attention.of_projection(watched, qkv, heads, bias)

  encoder.set_attributes(ops=dataclasses.replace(encoder.ops, attend=attend))
  # Both run blocks in a trace of their own, out of which nothing can be taken.
  own = {key: False for key in ('remat', 'scan') if hasattr(encoder.settings, key)}
  encoder.settings = dataclasses.replace(encoder.settings, **own)
  return Inside(_maps(encoder, images), tuple(seen))


def _maps(encoder: Any, images: jax.Array) -> tuple[jax.Array, ...]:
  if isinstance(encoder, Backbone | ITPNBackbone | SwinBackbone | ViTBackbone):
    return encoder(images)  # with its windows and norms
  if hasattr(encoder, 'features'):
    return encoder.features(images)
  b, height, width, _ = images.shape
  return tuple(
    x.reshape(b, height // info.stride, width // info.stride, info.channels)
    for x, info in zip(encoder.stages(images), encoder.feature_info, strict=True)
  )
