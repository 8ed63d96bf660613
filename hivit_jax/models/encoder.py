"""What the encoders of all families share: settings, contract, checks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import layers
from hivit_jax.models.units import unit_grid
from hivit_jax.ops.choice import FAST, Ops
from hivit_jax.settings import image_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings of every model.

  Attributes:
    image_size: (height, width) in pixels, or one side.
    channels: of the images.
    drop_path_rate: the largest; rates rise linearly from 0 over all blocks.
    remat: recompute activations in the backward pass.
    dtype: of the computation, float32 or bfloat16; parameters are float32.

  Raises:
    UserError: a value does not fit. Each family checks its own.
  """

  image_size: tuple[int, int] = (224, 224)
  channels: int = 3
  drop_path_rate: float = 0.0
  remat: bool = False
  dtype: Any = 'float32'

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name.endswith('image_size') and value is not None:
        value = image_size(value, field.name)
      if field.name == 'dtype':
        value = _float_type(value)
      object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)
    if not 0 <= self.drop_path_rate < 1:
      raise UserError(f'drop_path_rate must be at least 0 and below 1, got {self.drop_path_rate}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSettings(Settings):
  """Settings of encoders with a token for each unit of 16x16 pixels: HiViT and ViT.

  Attributes:
    embed_dim: channels C of the tokens, a multiple of 4 and of `num_heads`.
    num_heads: of every attention.
    mlp_ratio: hidden width of the MLPs, as a multiple of C.
    scan: run the transformer blocks as one `lax.scan`, see `layers.apply_blocks`.
  """

  embed_dim: int
  num_heads: int
  mlp_ratio: float = 4.0
  scan: bool = False

  def __post_init__(self):
    super().__post_init__()
    unit_grid(self.image_size)
    if self.embed_dim % 4:
      raise UserError(f'embed_dim must be a multiple of 4, got {self.embed_dim}')

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of units."""
    return unit_grid(self.image_size)


def _float_type(dtype: Any) -> np.dtype:
  try:
    known = None if dtype is None else jnp.dtype(dtype)
  except TypeError:
    known = None
  if known is None or not jnp.issubdtype(known, jnp.floating):
    raise UserError(f'dtype={dtype!r}: expected float32 or bfloat16')
  return known


class FeatureInfo(NamedTuple):
  """One level of a model's feature maps.

  Attributes:
    level: counted from 1.
    channels: C of the (B, h, w, C) map.
    stride: pixels of the image from one cell to the next.
  """

  level: int
  channels: int
  stride: int


class Encoder(nnx.Module):
  """The contract of every encoder, whether it is alone or part of a classifier or autoencoder.

    forward_features(images, ids=None, drop_path_noise=None): the output of the last stage.
    pooled(images, drop_path_noise=None): (B, C), its mean over an image.
    stages(images, ...): the outputs of all stages.
    unit_tokens(images): the same by units, (B, rows, columns, cells, c) of each stage.
    feature_info: channels and stride of each level, the last of C channels where it is a stage's.
    drop_path_noise(rng, batch): random numbers for drop path, which is off without them.

  Images are (B, H, W, channels), normalised floating point numbers. `ids` (B, K) are the units that
  are kept, as positions in the row-major grid; encoders that mix units earlier refuse it.
  """

  forward_features: Callable[..., jax.Array]
  pooled: Callable[..., jax.Array]
  stages: Callable[..., tuple[jax.Array, ...]]
  settings: Any
  grid: tuple[int, int]  # (rows, columns) of units

  ops: Ops = FAST

  def __init__(self, settings: Settings, blocks: int):
    self.settings = settings
    self.image_size = settings.image_size
    self.channels = settings.channels
    self.drop_path_rates = layers.rising_rates(settings.drop_path_rate, blocks)

  def unit_tokens(self, images: jax.Array) -> tuple[jax.Array, ...]:
    """The outputs of all stages by units: (B, rows, columns, cells of a unit, c) of each."""
    return tuple(x.reshape(len(x), *self.grid, -1, x.shape[-1]) for x in self.stages(images))

  def drop_path_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide about one batch's residual branches: (batch, blocks, 2)."""
    return jax.random.uniform(rng, (batch, len(self.drop_path_rates), 2))

  def _check(self, images: jax.Array, *, any_size: bool = False) -> None:
    """UserError for images that do not fit this model."""
    if images.ndim != 4 or images.shape[3] != self.channels:
      raise UserError(f'images must be (B, H, W, {self.channels}), got {images.shape}')
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise UserError(
        f'images must be normalised floating point numbers, got {images.dtype}: divide pixels by '
        '255, subtract the mean of each channel and divide by its standard deviation'
      )
    if not any_size and images.shape[1:3] != self.image_size:
      (height, width), size = self.image_size, images.shape[1:3]
      raise UserError(
        f'this model takes images of {height}x{width} pixels, got {size[0]}x{size[1]}; '
        'image_size= of create_model sets it'
      )

  def _run(
    self,
    blocks: Sequence[nnx.Module],
    start: int,
    x: jax.Array,
    drop_path_noise: jax.Array | None,
    *args: Any,
    scan: bool = False,
  ) -> jax.Array:
    """Runs residual blocks, of which `start` come before; see `layers.apply_blocks`."""
    part = slice(start, start + len(blocks))
    return layers.apply_blocks(
      blocks,
      x,
      *args,
      rates=self.drop_path_rates[part],
      noise=None if drop_path_noise is None else jnp.moveaxis(drop_path_noise[:, part], 1, 0),
      remat=self.settings.remat,
      scan=scan,
    )
