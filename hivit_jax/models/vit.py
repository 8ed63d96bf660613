"""ViT (arXiv 2010.11929), as classifier and as masked autoencoder (MAE, arXiv 2111.06377).

Parameter names and initialisation are MAE's. Patches are 16x16 pixels: a
patch is what HiViT calls a unit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models import layers, positions
from hivit_jax.models.classifier import Classifier, HeadSettings
from hivit_jax.models.encoder import Encoder, FeatureInfo, TokenSettings
from hivit_jax.models.mae import MAESettings, MaskedAutoencoder
from hivit_jax.models.patches import PatchEmbed
from hivit_jax.models.units import UNIT, split_units
from hivit_jax.ops import initializers
from hivit_jax.ops.modules import Linear, layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTSettings(TokenSettings):
  """Settings of ViT's encoder.

  Attributes:
    depth: transformer blocks.
  """

  depth: int


class ViTEncoder(Encoder):
  """Patch embedding, class token, position embedding, transformer blocks.

  Args:
    settings: see `ViTSettings`.
    rngs: `nnx.Rngs` with a `params` stream.
  """

  class_tokens = 1
  fixed_position = False  # no gradient reaches the position embedding

  def __init__(self, settings: ViTSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, settings.depth)
    self.grid = settings.grid
    c, options = settings.embed_dim, {'rngs': rngs, 'dtype': settings.dtype}
    self.patch_embed = PatchEmbed(
      UNIT,
      settings.channels,
      c,
      norm=False,
      kernel_bound=_xavier(UNIT * UNIT * settings.channels, c),  # of the convolution as a Linear
      **options,
    )
    self.cls_token = nnx.Param(initializers.normal(0.02)(rngs.params(), (1, 1, c)))
    self.pos_embed = nnx.Param(positions.sincos_2d(c, self.grid, self.class_tokens))
    self.blocks = nnx.List(
      layers.Block(c, settings.num_heads, mlp_ratio=settings.mlp_ratio, **options)
      for _ in range(settings.depth)
    )

  def forward_features(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes all patches, or only those in `ids`; the others are never computed.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      ids: (B, K) integer positions of the patches to keep, in the row-major grid.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.

    Returns:
      (B, 1 + K, C): class token and patches, K = N without ids.

    Raises:
      UserError: images of another size, type or other channels.
    """
    x = self._first_tokens(images, ids)
    return self._run(self.blocks, 0, x, drop_path_noise, scan=self.settings.scan)

  def _first_tokens(self, images: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    """What the first block gets, (B, 1 + K, C); arguments as for `forward_features`."""
    self._check(images)
    units, position = split_units(images), self.pos_embed[...]
    if self.fixed_position:
      position = jax.lax.stop_gradient(position)
    of_class, of_patches = position[:, :1], position[:, 1:]
    if ids is not None:
      units = self.ops.gather_units(units, ids)  # (B, K, 16, 16, channels)
      of_patches = self.ops.gather_shared(of_patches[0], ids)  # (B, K, C)
    x = self.patch_embed(units.reshape(*units.shape[:2], -1))
    x = layers.add_parameter(x, of_patches)
    first = jnp.broadcast_to(self.cls_token[...] + of_class, (x.shape[0], 1, x.shape[-1]))
    return jnp.concatenate([first.astype(x.dtype), x], axis=1)  # (B, 1 + K, C)

  def stages(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """(B, H, W, channels) -> ((B, K, C),): the patches' last tokens; see `forward_features`."""
    return (self.forward_features(images, ids, drop_path_noise)[:, 1:],)

  def pooled(self, images: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of the patches' tokens."""
    return self.forward_features(images, None, drop_path_noise)[:, 1:].mean(axis=1)

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """The one level: the patches."""
    return (FeatureInfo(1, self.settings.embed_dim, UNIT),)


def _xavier(fan_in: int, fan_out: int) -> float:
  """The bound of Xavier's uniform distribution."""
  return math.sqrt(6 / (fan_in + fan_out))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTClassifierSettings(HeadSettings, ViTSettings):
  """Settings of ViT with a head."""


class ViT(ViTEncoder, Classifier):
  """ViT classifier as MAE finetunes it: mean over the patches, LayerNorm, Linear."""

  def __init__(self, settings: ViTClassifierSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    self.fc_norm = layer_norm(settings.embed_dim, rngs=rngs, dtype=settings.dtype)
    self._add_head(settings, settings.embed_dim, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTMAESettings(MAESettings, ViTSettings):
  """Settings of ViT as a masked autoencoder."""


class ViTMaskedAutoencoder(ViTEncoder, MaskedAutoencoder):
  """MAE with a ViT encoder; its position embeddings are fixed."""

  fixed_position = True

  def __init__(self, settings: ViTMAESettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    self.norm = layer_norm(settings.embed_dim, rngs=rngs, dtype=settings.dtype)
    self._add_decoder(settings, settings.embed_dim, rngs=rngs)
    for _, module in nnx.iter_modules(self):
      if isinstance(module, Linear):
        shape = module.kernel.shape
        module.kernel[...] = initializers.uniform(_xavier(*shape))(rngs.params(), shape)

  def latent(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> jax.Array:
    """What the decoder gets, (B, 1 + K, C); arguments as for `forward_features`."""
    return self.norm(self.forward_features(images, ids, drop_path_noise))
