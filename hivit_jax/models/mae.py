"""Masked autoencoding with HiViT (arXiv 2205.14949, section 3.3; MAE, arXiv 2111.06377)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models import positions
from hivit_jax.models.hivit import HiViTEncoder, to_rows_and_columns
from hivit_jax.models.masking import MaskedDecoder
from hivit_jax.ops.modules import layer_norm


class MaskedAutoencoder(HiViTEncoder, MaskedDecoder):
  """HiViT encoder on the kept units, light transformer decoder on all of them.

  Args:
    hifeat: feed the decoder the outputs of all three stages ("hierarchical features") instead of
      the last one's.
    decoder_embed_dim, decoder_depth, decoder_num_heads, mask_ratio, norm_pix_loss: see
      `MaskedDecoder`.
    Others as for `HiViTEncoder`.
  """

  def __init__(
    self,
    *,
    image_size: tuple[int, int] = (224, 224),
    channels: int = 3,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: int,
    stem_blocks: Sequence[int] | None = None,
    stem_mlp_ratio: float = 3.0,
    mlp_ratio: float = 4.0,
    decoder_embed_dim: int = 512,
    decoder_depth: int = 6,
    decoder_num_heads: int = 16,
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = True,
    hifeat: bool = True,
    rpe: bool = False,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    scan: bool = False,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      image_size=image_size,
      channels=channels,
      embed_dim=embed_dim,
      depths=depths,
      stem_blocks=stem_blocks,
      num_heads=num_heads,
      stem_mlp_ratio=stem_mlp_ratio,
      mlp_ratio=mlp_ratio,
      rpe=rpe,
      drop_path_rate=drop_path_rate,
      remat=remat,
      scan=scan,
      dtype=dtype,
      pos_embed_init=lambda key, shape: jnp.asarray(positions.sincos_2d(embed_dim, self.grid)),
      table_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    if hifeat:
      self.norm = layer_norm(7 * embed_dim, rngs=rngs, dtype=dtype)
    self.hifeat = hifeat
    self._add_decoder(
      7 * embed_dim if hifeat else embed_dim,
      decoder_embed_dim,
      decoder_depth,
      decoder_num_heads,
      mask_ratio=mask_ratio,
      norm_pix_loss=norm_pix_loss,
      rngs=rngs,
      dtype=dtype,
    )

  def stages(self, images: jax.Array) -> tuple[jax.Array, ...]:
    """Outputs of the three stages for whole images, see `encode`."""
    return self.encode(images)

  def pooled(self, images: jax.Array) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of the main stage's tokens, unmasked."""
    return self.encode(images)[-1].mean(axis=1)

  def latent(
    self, images: jax.Array, *, ids: jax.Array | None = None, noise: jax.Array | None = None
  ) -> jax.Array:
    """What the decoder gets; arguments as for `encode`.

    Returns:
      (B, K, 7C) with hierarchical features, else (B, K, C).
    """
    stage1, stage2, stage3 = self.encode(images, ids=ids, noise=noise)
    if not self.hifeat:
      return stage3
    b, k, _ = stage3.shape
    levels = [to_rows_and_columns(level).reshape(b, k, -1) for level in (stage1, stage2)]
    return self.norm(jnp.concatenate([*levels, stage3], axis=-1))
