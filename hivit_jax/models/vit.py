"""ViT (arXiv 2010.11929), as classifier and as masked autoencoder (MAE, arXiv 2111.06377).

The names of parameters and what they start as are those of MAE's code. Patches are 16x16 pixels: a
patch is what HiViT calls a unit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import layers, positions
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.hivit import UNIT, split_units, unit_grid
from hivit_jax.models.masking import MaskedDecoder
from hivit_jax.ops.modules import Linear, layer_norm


class PatchEmbed(nnx.Module):
  """16x16 convolution of stride 16."""

  def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs, dtype: Any):
    bound = np.sqrt(6 / (UNIT * UNIT * channels + features))  # Xavier's, as if it were a Linear
    init = layers.uniform_init(bound)
    self.proj = layers.patch_conv(
      channels, features, UNIT, kernel_init=init, rngs=rngs, dtype=dtype
    )

  def __call__(self, units: jax.Array) -> jax.Array:
    """(B, K, 16, 16, channels) -> (B, K, features)."""
    b, k, *_ = units.shape
    return self.proj(units.reshape(b, k, -1))


class ViTEncoder(layers.StochasticDepth, nnx.Module):
  """Patch embedding, class token, position embedding, transformer blocks.

  Args:
    image_size: (height, width) in pixels, multiples of 16.
    channels: input channels.
    embed_dim: channels C, a multiple of 4 and of `num_heads`.
    depth: transformer blocks.
    num_heads: heads of each.
    mlp_ratio: hidden width of the MLPs, as a multiple of C.
    drop_path_rate: maximum; rates rise linearly from 0 over all blocks.
    remat, scan: see `layers.apply_blocks`.
    dtype: of the computation; parameters are float32.
    rngs: `nnx.Rngs` with a `params` stream.
  """

  class_tokens = 1
  fixed_position = False  # no gradient reaches the position embedding

  def __init__(
    self,
    *,
    image_size: tuple[int, int],
    channels: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path_rate: float,
    remat: bool,
    scan: bool,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    if embed_dim % 4:
      raise UserError(f'embed_dim must be a multiple of 4, got {embed_dim}')
    self.image_size = image_size
    self.grid = unit_grid(image_size)
    self.channels = channels
    self.embed_dim = embed_dim
    self.depth = depth
    self.remat = remat
    self.scan = scan
    options = {'rngs': rngs, 'dtype': dtype}
    self.patch_embed = PatchEmbed(channels, embed_dim, **options)
    normal = nnx.initializers.normal(0.02)
    self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, embed_dim)))
    position = positions.sincos_2d(embed_dim, self.grid, self.class_tokens)
    self.pos_embed = nnx.Param(jnp.asarray(position))
    self.blocks = nnx.List(
      layers.Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, **options) for _ in range(depth)
    )
    self.drop_path_rates = layers.rising_rates(drop_path_rate, depth)

  def encode(
    self, images: jax.Array, *, ids: jax.Array | None = None, noise: jax.Array | None = None
  ) -> jax.Array:
    """Encodes all patches, or only those in `ids`; the others are never computed.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      ids: (B, K) integer positions of the patches to keep, in the row-major grid.
      noise: from `drop_path_noise`; None (evaluation) switches drop path off.

    Returns:
      (B, 1 + K, C): class token and patches, K = N without ids.

    Raises:
      UserError: images of another size or other channels.
    """
    if images.ndim != 4 or images.shape[1:] != (*self.image_size, self.channels):
      height, width = self.image_size
      raise UserError(
        f'this model takes images (B, {height}, {width}, {self.channels}), got {images.shape}; '
        'image_size= of create_model sets it'
      )
    units = split_units(images)
    position = self.pos_embed[...]
    if self.fixed_position:
      position = jax.lax.stop_gradient(position)
    of_class, of_patches = position[:, :1], position[:, 1:]
    if ids is not None:
      units = self.ops.gather_units(units, ids)
      of_patches = self.ops.gather_shared(of_patches[0], ids)  # (B, K, C)
    x = self.patch_embed(units)
    x = layers.add_parameter(x, of_patches)
    first = jnp.broadcast_to(self.cls_token[...] + of_class, (len(x), 1, self.embed_dim))
    x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    return layers.apply_blocks(
      self.blocks,
      x,
      rates=self.drop_path_rates,
      noise=None if noise is None else jnp.moveaxis(noise, 1, 0),
      remat=self.remat,
      scan=self.scan,
    )

  def stages(self, images: jax.Array) -> tuple[jax.Array, ...]:
    """(B, H, W, channels) -> ((B, N, C),): the patches' last tokens."""
    return (self.encode(images)[:, 1:],)


class ViT(ViTEncoder, Classifier):
  """ViT classifier as MAE finetunes it: mean over the patches, LayerNorm, Linear.

  Args:
    num_classes, head_std, head_batch_norm: see `classifier.Classifier`.
    Others as for `ViTEncoder`.
  """

  def __init__(
    self,
    *,
    image_size: tuple[int, int] = (224, 224),
    channels: int = 3,
    num_classes: int = 1000,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    scan: bool = False,
    head_std: float = 0.02,
    head_batch_norm: bool = False,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      image_size=image_size,
      channels=channels,
      embed_dim=embed_dim,
      depth=depth,
      num_heads=num_heads,
      mlp_ratio=mlp_ratio,
      drop_path_rate=drop_path_rate,
      remat=remat,
      scan=scan,
      dtype=dtype,
      rngs=rngs,
    )
    self.fc_norm = layer_norm(embed_dim, rngs=rngs, dtype=dtype)
    self._add_head(
      embed_dim, num_classes, std=head_std, batch_norm=head_batch_norm, rngs=rngs, dtype=dtype
    )

  def pooled(self, images: jax.Array, *, noise: jax.Array | None = None) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of the patches' tokens."""
    return self.encode(images, noise=noise)[:, 1:].mean(axis=1)


class ViTMaskedAutoencoder(ViTEncoder, MaskedDecoder):
  """MAE with a ViT encoder; its position embeddings are fixed.

  Args:
    decoder_embed_dim, decoder_depth, decoder_num_heads, mask_ratio, norm_pix_loss: see
      `MaskedDecoder`.
    Others as for `ViTEncoder`.
  """

  fixed_position = True

  def __init__(
    self,
    *,
    image_size: tuple[int, int] = (224, 224),
    channels: int = 3,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    decoder_embed_dim: int = 512,
    decoder_depth: int = 8,
    decoder_num_heads: int = 16,
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = True,
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
      depth=depth,
      num_heads=num_heads,
      mlp_ratio=mlp_ratio,
      drop_path_rate=drop_path_rate,
      remat=remat,
      scan=scan,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = layer_norm(embed_dim, rngs=rngs, dtype=dtype)
    self._add_decoder(
      embed_dim,
      decoder_embed_dim,
      decoder_depth,
      decoder_num_heads,
      mask_ratio=mask_ratio,
      norm_pix_loss=norm_pix_loss,
      rngs=rngs,
      dtype=dtype,
    )
    xavier = nnx.initializers.xavier_uniform()
    for _, module in nnx.iter_modules(self):
      if isinstance(module, Linear):
        module.kernel[...] = xavier(rngs.params(), module.kernel.shape)

  def latent(
    self, images: jax.Array, *, ids: jax.Array | None = None, noise: jax.Array | None = None
  ) -> jax.Array:
    """What the decoder gets, (B, 1 + K, C); arguments as for `encode`."""
    return self.norm(self.encode(images, ids=ids, noise=noise))
