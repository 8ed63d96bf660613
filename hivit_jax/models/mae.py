"""Masked autoencoding (MAE, arXiv 2111.06377), with HiViT (arXiv 2205.14949, section 3.3)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import layers, positions, targets
from hivit_jax.models.encoder import Encoder, TokenSettings
from hivit_jax.models.hivit import HiViTEncoder, HiViTSettings
from hivit_jax.models.masking import (
  MAEOutput,
  kept_units,
  mask_to_noise,
  pixel_target,
  random_masking,
)
from hivit_jax.models.units import to_rows_and_columns
from hivit_jax.ops import initializers
from hivit_jax.ops.modules import layer_norm, linear
from hivit_jax.ops.precision import widen


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAESettings(TokenSettings):
  """Settings of a masked autoencoder in addition to its encoder's.

  Attributes:
    decoder_embed_dim: channels of the decoder, a multiple of 4 and of `decoder_num_heads`.
    decoder_depth: its transformer blocks.
    decoder_num_heads: heads of each.
    mask_ratio: share of units removed; `int(N * (1 - mask_ratio))` are kept.
    norm_pix_loss: predict pixels normalised per unit.
    target: what is predicted, see `targets`: 'pixels', or 'saratrx' or 'saratrx_v2' of SAR images.
  """

  decoder_embed_dim: int = 512
  decoder_depth: int = 8
  decoder_num_heads: int = 16
  mask_ratio: float = 0.75
  norm_pix_loss: bool = True
  target: str = targets.PIXELS

  def __post_init__(self):
    super().__post_init__()
    self.kept(self.mask_ratio)
    targets.check(self.target)
    width, heads = self.decoder_embed_dim, self.decoder_num_heads
    if width % 4:
      raise UserError(f'decoder_embed_dim={width} is not a multiple of 4')
    if width % heads:
      raise UserError(f'decoder_num_heads={heads} does not divide decoder_embed_dim={width}')

  def kept(self, ratio: float) -> int:
    """Number of units that a mask ratio keeps; UserError when that is none or all of them."""
    return kept_units(self.grid[0] * self.grid[1], ratio)


class MaskedAutoencoder(Encoder):
  """An encoder sees some units, a light transformer decoder predicts the pixels of the others."""

  latent: Callable[..., jax.Array]  # what the decoder gets, (images, ids, drop_path_noise)
  grid: tuple[int, int]
  class_tokens = 0  # before the units, in the latents and in `decoder_pos_embed`
  hogs: Any  # of the target `saratrx_v2`, else None
  mask_tokens = 1  # their sum stands for a removed unit

  def _add_decoder(self, settings: MAESettings, width: int, *, rngs: nnx.Rngs) -> None:
    """Adds the decoder's parameters, for latents of `width` channels."""
    self.mask_ratio = settings.mask_ratio
    self.norm_pix_loss = settings.norm_pix_loss
    self.predicts = settings.target
    c, options = settings.decoder_embed_dim, {'rngs': rngs, 'dtype': settings.dtype}
    self.decoder_embed = self._decoder_embed(width, c, **options)
    self.mask_token = nnx.Param(initializers.normal(0.02)(rngs.params(), (1, 1, c)))
    # Fixed: `decode` stops its gradient and the optimizers freeze it by name.
    self.decoder_pos_embed = nnx.Param(positions.sincos_2d(c, self.grid, self.class_tokens))
    self.decoder_blocks = nnx.List(
      layers.Block(c, settings.decoder_num_heads, mlp_ratio=4.0, **options)
      for _ in range(settings.decoder_depth)
    )
    self.decoder_norm = layer_norm(c, **options)
    numbers = targets.width(settings.target, self.channels)
    self.decoder_pred = linear(c, numbers, **options)
    self.hogs = targets.Fusion() if settings.target == targets.SARATRX_V2 else None

  def _decoder_embed(self, width: int, features: int, **options: Any) -> Any:
    return linear(width, features, **options)

  def _embed(self, latent: Any) -> jax.Array:
    """Latents -> (B, K, channels of the decoder)."""
    return self.decoder_embed(latent)

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
    ids_keep, ids_restore, removed = self._choose(images.shape[0], noise, rng, mask, mask_ratio)
    latent = self.latent(images, ids_keep, drop_path_noise)  # (B, K, width)
    pred = self.decode(latent, ids_restore)  # (B, N, 16 * 16 * channels)
    error = jnp.square(pred - self.target(images)).mean(axis=-1)  # (B, N)
    loss = (error * removed).sum() / removed.sum()
    return MAEOutput(loss, pred, removed, ids_keep, ids_restore)

  def _choose(
    self,
    batch: int,
    noise: jax.Array | None,
    rng: jax.Array | None,
    mask: np.ndarray | None,
    mask_ratio: float | None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kept units, by one of three ways; see `random_masking`."""
    units = self.grid[0] * self.grid[1]
    if sum(way is not None for way in (noise, rng, mask)) != 1:
      raise ValueError('give one of noise=, rng= and mask= to choose the units that are removed')
    if mask is not None:
      if mask_ratio is not None:
        raise ValueError('give mask_ratio= or mask=, which has a ratio of its own, not both')
      order, keep = mask_to_noise(mask, units)
    else:
      keep = self.settings.kept(self.mask_ratio if mask_ratio is None else mask_ratio)
      order = noise if rng is None else self.masking_noise(rng, batch)
    order = jnp.asarray(order)
    if order.shape != (batch, units):
      raise UserError(
        f'noise or mask must be {(batch, units)}, one number per unit, got {order.shape}'
      )
    return random_masking(order, keep)

  def masking_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide which units of a batch are kept: (batch, N)."""
    return jax.random.uniform(rng, (batch, self.grid[0] * self.grid[1]))

  def decode(
    self, latent: Any, ids_restore: jax.Array, removed: jax.Array | None = None
  ) -> jax.Array:
    """Latents of the kept units -> (B, N, numbers) float32, 16 * 16 * channels of them for pixels.

    Args:
      latent: of the method of that name, class tokens before the units.
      ids_restore: (B, N), see `random_masking`.
      removed: (B, N) bool, units whose latents are not used, as if they had not been kept.
    """
    x = self._embed(latent)
    others, x = x[:, : self.class_tokens], x[:, self.class_tokens :]
    b, k, c = x.shape
    n = ids_restore.shape[1]
    # Repeated before it is rounded, so that its gradient is summed in float32.
    token = self.mask_tokens * self.mask_token[...]
    token = jnp.broadcast_to(token, (b, n - k, c)).astype(x.dtype)
    x = self.ops.gather_units(jnp.concatenate([x, token], axis=1), ids_restore)  # (B, N, c)
    if removed is not None:
      token = self.mask_tokens * self.mask_token[...]
      x = jnp.where(removed[..., None], token.astype(x.dtype), x)
    if self.class_tokens:
      x = jnp.concatenate([others, x], axis=1)
    x = x + jax.lax.stop_gradient(self.decoder_pos_embed[...]).astype(x.dtype)
    x = layers.apply_blocks(
      self.decoder_blocks,
      x,
      rates=(0.0,) * len(self.decoder_blocks),
      noise=None,
      remat=self.settings.remat,
      scan=self.settings.scan,
    )
    x = self.decoder_norm(x)[:, self.class_tokens :]
    return widen(self.decoder_pred(x))

  def target(self, images: jax.Array) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, N, numbers) that `decode` should give."""
    if self.predicts == targets.SARATRX:
      return targets.saratrx(images)
    if self.predicts == targets.SARATRX_V2:
      return targets.saratrx_v2(images, self.hogs.simple_weights[...], self.norm_pix_loss)
    return pixel_target(images, self.norm_pix_loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiViTMAESettings(MAESettings, HiViTSettings):
  """Settings of HiViT as a masked autoencoder.

  Attributes:
    hifeat: feed the decoder the outputs of all three stages ("hierarchical features") instead of
      the last one's.
  """

  rpe: bool = False
  decoder_depth: int = 6
  hifeat: bool = True


class HiViTMaskedAutoencoder(HiViTEncoder, MaskedAutoencoder):
  """MAE with HiViT; the position embedding starts as sines and cosines and is learned."""

  def __init__(self, settings: HiViTMAESettings, *, rngs: nnx.Rngs):
    position = positions.sincos_2d(settings.embed_dim, settings.grid)
    super().__init__(settings, rngs=rngs, position=position)
    width = settings.embed_dim
    if settings.hifeat:
      width *= 7  # 4 C of the first stage, 2 C of the second, C
      self.norm = layer_norm(width, rngs=rngs, dtype=settings.dtype)
    self._add_decoder(settings, width, rngs=rngs)

  def latent(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> jax.Array:
    """What the decoder gets, (B, K, 7C) with `hifeat`, else (B, K, C); arguments as `stages`."""
    stage1, stage2, stage3 = self.stages(images, ids, drop_path_noise)
    if not self.settings.hifeat:
      return stage3
    b, k, _ = stage3.shape
    levels = [to_rows_and_columns(level).reshape(b, k, -1) for level in (stage1, stage2)]
    return self.norm(jnp.concatenate([*levels, stage3], axis=-1))
