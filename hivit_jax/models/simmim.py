"""SimMIM (arXiv 2111.09886) with a Swin encoder: masked patches are hidden, yet computed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models.encoder import FeatureInfo
from hivit_jax.models.masking import MAEOutput, random_masking
from hivit_jax.models.patches import convolution
from hivit_jax.models.swin import SwinEncoder, SwinSettings
from hivit_jax.models.units import PATCH
from hivit_jax.ops.precision import widen

_LOSS_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimMIMSettings(SwinSettings):
  """Settings of SimMIM with Swin.

  Attributes:
    mask_ratio: share of units masked, rounded up.
  """

  image_size: tuple[int, int] = (192, 192)
  window_size: int | tuple[int, ...] = 6
  mask_ratio: float = 0.6

  def __post_init__(self):
    super().__post_init__()
    self.kept(self.mask_ratio)

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of units, which are as large as the encoder's stride."""
    height, width = self.image_size
    return height // self.stride, width // self.stride

  def kept(self, ratio: float) -> int:
    """Number of units that a mask ratio keeps; UserError when that is none or all of them."""
    units = math.prod(self.grid)
    if not 0 < ratio < 1:
      raise UserError(f'mask_ratio must lie strictly between 0 and 1, got {ratio}')
    keep = units - math.ceil(units * ratio)
    if keep < 1:
      raise UserError(f'mask_ratio {ratio} keeps none of {units} units: need at least one')
    return keep


class SimMIM(nnx.Module):
  """Predicts the pixels of masked units from the last map by one Linear; L1 loss.

  Units are as large as the encoder's stride, 32x32 pixels with four stages. It offers the
  methods of `encoder.Encoder`; these mask nothing.
  """

  norm_pix_loss = False

  def __init__(self, settings: SimMIMSettings, *, rngs: nnx.Rngs):
    self.encoder = SwinEncoder(settings, rngs=rngs, masked=True)
    self.settings = settings
    self.image_size = settings.image_size
    self.channels = settings.channels
    self.grid = settings.grid
    self.mask_ratio = settings.mask_ratio
    width = settings.stride**2 * settings.channels
    # The official name of a 1x1 convolution, which a pixel shuffle follows.
    self.decoder = nnx.List(
      [convolution(1, settings.features, width, rngs=rngs, dtype=settings.dtype)]
    )

  @property
  def drop_path_rates(self) -> tuple[float, ...]:
    """Of all residual blocks."""
    return self.encoder.drop_path_rates

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """See `SwinEncoder`."""
    return self.encoder.feature_info

  def drop_path_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide about one batch's residual branches: (batch, blocks, 2)."""
    return self.encoder.drop_path_noise(rng, batch)

  def masking_noise(self, rng: jax.Array, batch: int) -> jax.Array:
    """Uniform numbers that decide which units of a batch are seen: (batch, N)."""
    return jax.random.uniform(rng, (batch, math.prod(self.grid)))

  def stages(
    self, images: jax.Array, drop_path_noise: jax.Array | None = None
  ) -> tuple[jax.Array, ...]:
    """(B, H, W, channels) normalised images -> (B, h, w, c) of each stage."""
    return self.encoder.stages(images, drop_path_noise)

  def unit_tokens(self, images: jax.Array) -> tuple[jax.Array, ...]:
    """See `SwinEncoder`."""
    return self.encoder.unit_tokens(images)

  def forward_features(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
  ) -> jax.Array:
    """(B, h, w, C), see `SwinEncoder`."""
    return self.encoder.forward_features(images, ids, drop_path_noise)

  def pooled(self, images: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of the last map."""
    return self.encoder.pooled(images, drop_path_noise)

  def patches(self, mask: jax.Array) -> jax.Array:
    """A mask of units (B, N) as one of patches (B, H / 4, W / 4)."""
    cells = self.settings.stride // PATCH
    return mask.reshape(-1, *self.grid).repeat(cells, axis=1).repeat(cells, axis=2)

  def reconstruct(
    self, images: jax.Array, mask: jax.Array, drop_path_noise: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Predictions and loss for a mask of patches.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      mask: (B, H / 4, W / 4), 1 = hidden.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.

    Returns:
      (B, N, unit * unit * channels) float32 pixels in (row, column, channel) order, () loss.
    """
    x = self.encoder.stages(images, drop_path_noise, mask=mask)[-1]  # (B, h, w, C)
    b, h, w, c = x.shape
    x = self.decoder[0](x.reshape(b, h * w, c))
    side, channels = self.settings.stride, self.channels
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
      noise = self.masking_noise(rng, images.shape[0])
    keep = self.settings.kept(self.mask_ratio if mask_ratio is None else mask_ratio)
    ids_keep, ids_restore, mask = random_masking(jnp.asarray(noise), keep)
    pred, loss = self.reconstruct(images, self.patches(mask), drop_path_noise)
    return MAEOutput(loss, pred, mask, ids_keep, ids_restore)
