"""SimMIM (arXiv 2111.09886) with a Swin encoder: masked patches are hidden, yet computed."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import layers
from hivit_jax.models.masking import MAEOutput, random_masking
from hivit_jax.models.swin import PATCH, SwinEncoder
from hivit_jax.ops.precision import widen

_LOSS_EPS = 1e-5


class SimMIM(nnx.Module):
  """Predicts the pixels of masked units from the last map by one Linear; L1 loss.

  Units are as large as the encoder's stride, 32x32 pixels with four stages.

  Args:
    mask_ratio: share of units masked, rounded up.
    Others as for `swin.SwinEncoder`.
  """

  norm_pix_loss = False

  def __init__(
    self,
    *,
    image_size: tuple[int, int] = (192, 192),
    channels: int = 3,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int = 6,
    mlp_ratio: float = 4.0,
    mask_ratio: float = 0.6,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    scan: bool = False,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.encoder = SwinEncoder(
      image_size=image_size,
      channels=channels,
      embed_dim=embed_dim,
      depths=depths,
      num_heads=num_heads,
      window_size=window_size,
      mlp_ratio=mlp_ratio,
      drop_path_rate=drop_path_rate,
      remat=remat,
      scan=scan,
      dtype=dtype,
      rngs=rngs,
      masked=True,
    )
    self.image_size = image_size
    self.channels = channels
    self.unit = self.encoder.stride
    self.grid = tuple(side // self.unit for side in image_size)
    self.mask_ratio = mask_ratio
    self._kept(mask_ratio)  # a bad ratio fails here, not in a step
    width = self.unit**2 * channels
    # The official name of a 1x1 convolution, which a pixel shuffle follows.
    self.decoder = nnx.List(
      [layers.patch_conv(self.encoder.features, width, 1, rngs=rngs, dtype=dtype)]
    )

  @property
  def drop_path_rates(self) -> tuple[float, ...]:
    return self.encoder.drop_path_rates

  def drop_path_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide about one batch's residual branches: (batch, blocks, 2)."""
    return self.encoder.drop_path_noise(rng, batch)

  def masking_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide which units of a batch are seen: (batch, N)."""
    return jax.random.uniform(rng, (batch, math.prod(self.grid)))

  def stages(self, images: jax.Array) -> tuple[jax.Array, ...]:
    """(B, H, W, channels) normalised images -> (B, h, w, c) of each stage, nothing masked."""
    return self.encoder.stages(images)

  def pooled(self, images: jax.Array) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of the last map, nothing masked."""
    return self.stages(images)[-1].mean(axis=(1, 2))

  def _kept(self, ratio: float) -> int:
    units = math.prod(self.grid)
    if not 0 < ratio < 1:
      raise UserError(f'mask_ratio must lie strictly between 0 and 1, got {ratio}')
    keep = units - math.ceil(units * ratio)
    if keep < 1:
      raise UserError(f'mask_ratio {ratio} keeps none of {units} units: need at least one')
    return keep

  def reconstruct(
    self, images: jax.Array, mask: jax.Array, *, noise: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Predictions and loss for a mask of patches.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      mask: (B, H / 4, W / 4), 1 = hidden.
      noise: from `drop_path_noise`; None (evaluation) switches drop path off.

    Returns:
      (B, N, unit * unit * channels) float32 pixels in (row, column, channel) order, () loss.
    """
    x = self.encoder.stages(images, mask=mask, noise=noise)[-1]  # (B, h, w, C)
    b, h, w, c = x.shape
    x = self.decoder[0](x.reshape(b, h * w, c))
    side, channels = self.unit, self.channels
    # The channels of a pixel shuffle are (channel, row, column).
    pred = jnp.moveaxis(widen(x).reshape(b, h * w, channels, side, side), 2, -1)
    target = widen(images).reshape(b, h, side, w, side, channels).swapaxes(2, 3)
    cells = side // PATCH
    hidden = (
      mask.reshape(b, h, cells, w, cells).swapaxes(2, 3).reshape(b, h * w, cells, 1, cells, 1)
    )
    error = jnp.abs(pred - target.reshape(pred.shape))
    error = error.reshape(b, h * w, cells, PATCH, cells, PATCH * channels) * hidden
    loss = error.sum() / (mask.sum() * PATCH**2 + _LOSS_EPS) / channels
    return pred.reshape(b, h * w, -1), loss

  def __call__(
    self,
    images: jax.Array,
    *,
    noise: jax.Array | None = None,
    rng: jax.Array | None = None,
    mask_ratio: float | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> MAEOutput:
    """Masks, encodes, predicts and compares.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      noise: (B, N), the units with the smallest noise are seen.
      rng: PRNG key that draws the noise.
      mask_ratio: instead of the model's; static under `jit`.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.

    Raises:
      ValueError: neither or both of `noise` and `rng` are given.
    """
    if (noise is None) == (rng is None):
      raise ValueError('give one of noise= and rng= to choose the units that are masked')
    if rng is not None:
      noise = self.masking_noise(rng, len(images))
    keep = self._kept(self.mask_ratio if mask_ratio is None else mask_ratio)
    ids_keep, ids_restore, mask = random_masking(jnp.asarray(noise), keep)
    cells = self.unit // PATCH
    patches = mask.reshape(-1, *self.grid).repeat(cells, axis=1).repeat(cells, axis=2)
    pred, loss = self.reconstruct(images, patches, noise=drop_path_noise)
    return MAEOutput(loss=loss, pred=pred, mask=mask, ids_keep=ids_keep, ids_restore=ids_restore)
