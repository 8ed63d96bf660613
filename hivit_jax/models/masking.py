"""Masked autoencoding of units, for any encoder that takes some of them (MAE, arXiv 2111.06377)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import core

from hivit_jax.errors import UserError
from hivit_jax.models import layers, positions
from hivit_jax.models.hivit import UNIT, split_units
from hivit_jax.ops.choice import FAST, Ops
from hivit_jax.ops.modules import layer_norm, linear
from hivit_jax.ops.precision import widen


@struct.dataclass
class MAEOutput:
  """What `MaskedDecoder.__call__` gives.

  Attributes:
    loss: () float32, mean squared error over the removed units.
    pred: (B, N, 16 * 16 * channels) float32, pixels in (row, column, channel) order, in the space
      of the target: normalised per unit when `norm_pix_loss` is on.
    mask: (B, N) float32, 1 = removed.
    ids_keep: (B, K) int32, positions of the kept units.
    ids_restore: (B, N) int32, for each unit its place in the shuffled sequence.
  """

  loss: jax.Array
  pred: jax.Array
  mask: jax.Array
  ids_keep: jax.Array
  ids_restore: jax.Array


def kept_units(units: int, mask_ratio: float) -> int:
  """Number of units that a mask ratio keeps; UserError when that is none or all of them."""
  if not 0 < mask_ratio < 1:
    raise UserError(f'mask_ratio must lie strictly between 0 and 1, got {mask_ratio}')
  keep = int(units * (1 - mask_ratio))
  if not 0 < keep < units:
    raise UserError(f'mask_ratio {mask_ratio} keeps {keep} of {units} units: need at least one')
  return keep


def random_masking(noise: jax.Array, keep: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Keeps the units with the smallest noise.

  Args:
    noise: (B, N), one number per unit.
    keep: K, units to keep.

  Returns:
    ids_keep (B, K) in order of rising noise, ids_restore (B, N), mask (B, N; 1 = removed).
  """
  ids_shuffle = jnp.argsort(noise, axis=1)
  ids_restore = jnp.argsort(ids_shuffle, axis=1)
  return ids_shuffle[:, :keep], ids_restore, (ids_restore >= keep).astype(jnp.float32)


def mask_to_noise(mask: np.ndarray, units: int) -> tuple[np.ndarray, int]:
  """Turns a chosen mask into the noise that produces it.

  Args:
    mask: (B, N), 1 or True = removed; concrete (not traced), the same count in every row.
    units: N.

  Returns:
    noise (B, N) for `random_masking`, which sorts stably, and the number of kept units.

  Raises:
    ValueError: the mask is traced.
    UserError: it is no such mask.
  """
  if isinstance(mask, core.Tracer):
    raise ValueError('mask must be concrete: inside jit its count of kept units would be unknown')
  mask = np.asarray(mask, np.float32)
  if mask.ndim != 2 or mask.shape[1] != units:
    raise UserError(f'mask must be (B, {units}), one number per unit, got shape {mask.shape}')
  other = mask[~np.isin(mask, (0, 1))]
  if other.size:
    raise UserError(f'mask must be 1 (removed) or 0 (kept) everywhere, got {other[0]}')
  counts = np.unique((mask == 0).sum(axis=1))
  if len(counts) != 1 or not 0 < counts[0] < units:
    raise UserError(
      f'mask must keep the same number of units, 1 to {units - 1}, in every row, keeps '
      + ' or '.join(map(str, counts))
    )
  return mask, int(counts[0])


def unit_moments(target: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and *unbiased* variance per unit: (B, N, P) -> two of (B, N, 1)."""
  return target.mean(axis=-1, keepdims=True), target.var(axis=-1, ddof=1, keepdims=True)


NORM_PIX_EPS = 1e-6


class MaskedDecoder:
  """What makes an encoder of units a masked autoencoder: decoder, target and loss.

  The encoder has `grid`, `channels` and `latent(images, ids=..., noise=...)`.

  Args of `_add_decoder`:
    width: channels of the latents.
    embed_dim, depth, num_heads: of the decoder.
    mask_ratio: share of units removed; `int(N * (1 - mask_ratio))` are kept.
    norm_pix_loss: predict pixels normalised per unit.
  """

  grid: tuple[int, int]
  channels: int
  remat: bool
  scan: bool
  latent: Callable[..., jax.Array]
  ops: Ops = FAST
  class_tokens = 0  # before the units, in the latents and in `decoder_pos_embed`

  def _add_decoder(
    self,
    width: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    *,
    mask_ratio: float,
    norm_pix_loss: bool,
    rngs: nnx.Rngs,
    dtype: Any,
  ) -> None:
    kept_units(self.grid[0] * self.grid[1], mask_ratio)  # a bad ratio fails here, not in a step
    if embed_dim % 4:
      raise UserError(f'decoder_embed_dim={embed_dim} is not a multiple of 4')
    if embed_dim % num_heads:
      raise UserError(
        f'decoder_num_heads={num_heads} does not divide decoder_embed_dim={embed_dim}'
      )
    self.mask_ratio = mask_ratio
    self.norm_pix_loss = norm_pix_loss
    options = {'rngs': rngs, 'dtype': dtype}
    self.decoder_embed = linear(width, embed_dim, **options)
    self.mask_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, embed_dim)))
    # Fixed: `decode` stops its gradient and the optimizers freeze it by name.
    position = positions.sincos_2d(embed_dim, self.grid, self.class_tokens)
    self.decoder_pos_embed = nnx.Param(jnp.asarray(position))
    self.decoder_blocks = nnx.List(
      layers.Block(embed_dim, num_heads, mlp_ratio=4.0, **options) for _ in range(depth)
    )
    self.decoder_norm = layer_norm(embed_dim, **options)
    self.decoder_pred = linear(embed_dim, UNIT * UNIT * self.channels, **options)

  def decode(self, latent: jax.Array, ids_restore: jax.Array) -> jax.Array:
    """Latents of the kept units -> (B, N, 16 * 16 * channels) float32 pixels.

    Args:
      latent: (B, K, width), class tokens before the units.
      ids_restore: (B, N), see `random_masking`.
    """
    x = self.decoder_embed(latent)
    others, x = x[:, : self.class_tokens], x[:, self.class_tokens :]
    b, k, c = x.shape
    n = ids_restore.shape[1]
    # Repeated before it is rounded, so that its gradient is summed in float32.
    token = jnp.broadcast_to(self.mask_token[...], (b, n - k, c)).astype(x.dtype)
    x = self.ops.gather_units(jnp.concatenate([x, token], axis=1), ids_restore)
    if self.class_tokens:
      x = jnp.concatenate([others, x], axis=1)
    x = x + jax.lax.stop_gradient(self.decoder_pos_embed[...]).astype(x.dtype)
    x = layers.apply_blocks(
      self.decoder_blocks,
      x,
      rates=(0.0,) * len(self.decoder_blocks),
      noise=None,
      remat=self.remat,
      scan=self.scan,
    )
    x = self.decoder_norm(x)[:, self.class_tokens :]
    return widen(self.decoder_pred(x))

  def masking_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide which units of a batch are kept: (batch, N)."""
    return jax.random.uniform(rng, (batch, self.grid[0] * self.grid[1]))

  def target(self, images: jax.Array) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, N, 16 * 16 * channels) what `pred` should be."""
    units = split_units(widen(images))
    target = units.reshape(*units.shape[:2], -1)
    if self.norm_pix_loss:
      mean, variance = unit_moments(target)
      target = (target - mean) * jax.lax.rsqrt(variance + NORM_PIX_EPS)
    return target

  def __call__(
    self,
    images: jax.Array,
    *,
    noise: jax.Array | None = None,
    rng: jax.Array | None = None,
    mask: np.ndarray | None = None,
    mask_ratio: float | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> MAEOutput:
    """Masks, encodes, decodes and compares.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      noise: (B, N), the units with the smallest noise are kept.
      rng: PRNG key that draws the noise.
      mask: (B, N) zeros and ones, 1 = removed, concrete; instead of noise.
      mask_ratio: instead of the model's; static under `jit`.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.

    Raises:
      ValueError: none or several of the ways to choose units are given.
      UserError: a shape, ratio or mask does not fit.
    """
    b, n = images.shape[0], self.grid[0] * self.grid[1]
    if sum(way is not None for way in (noise, rng, mask)) != 1:
      raise ValueError('give one of noise=, rng= and mask= to choose the units that are removed')
    if mask is not None:
      if mask_ratio is not None:
        raise ValueError('give mask_ratio= or mask=, which has a ratio of its own, not both')
      order, keep = mask_to_noise(mask, n)
    else:
      keep = kept_units(n, self.mask_ratio if mask_ratio is None else mask_ratio)
      order = noise if rng is None else self.masking_noise(rng, b)
    order = jnp.asarray(order)
    if order.shape != (b, n):
      raise UserError(f'noise or mask must be {(b, n)}, one number per unit, got {order.shape}')
    ids_keep, ids_restore, removed = random_masking(order, keep)
    latent = self.latent(images, ids=ids_keep, noise=drop_path_noise)
    pred = self.decode(latent, ids_restore)
    error = jnp.square(pred - self.target(images)).mean(axis=-1)  # (B, N)
    return MAEOutput(
      loss=(error * removed).sum() / removed.sum(),
      pred=pred,
      mask=removed,
      ids_keep=ids_keep,
      ids_restore=ids_restore,
    )
