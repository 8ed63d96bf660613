"""Classifier: an encoder with a head."""

import dataclasses

import jax
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models.encoder import Encoder, Settings
from hivit_jax.ops.modules import batch_norm, linear
from hivit_jax.ops.precision import at_least_float32, widen


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSettings(Settings):
  """Settings of a classifier's head.

  Attributes:
    num_classes: number of logits; 0: no head, the output is the features before it.
    head_std: standard deviation of the head's initial weights.
    head_batch_norm: a BatchNorm without scale and bias before the head, as in MAE's linear probe
      (arXiv 2111.06377, appendix A).
  """

  num_classes: int = 1000
  head_std: float = 0.02
  head_batch_norm: bool = False

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.num_classes, int) or self.num_classes < 0:
      raise UserError(f'num_classes must be positive, or 0 for features, got {self.num_classes}')


class Classifier(Encoder):
  """An encoder with a linear head on its pooled features."""

  fc_norm: nnx.Module | None = None  # between the two

  def _add_head(self, settings: HeadSettings, width: int, *, rngs: nnx.Rngs) -> None:
    self.head_norm = batch_norm(width, rngs=rngs) if settings.head_batch_norm else None
    # Not in bfloat16, in which several logits would be the largest.
    options = {'rngs': rngs, 'dtype': at_least_float32(settings.dtype)}
    classes = settings.num_classes
    self.head = linear(width, classes, std=settings.head_std, **options) if classes else None

  def __call__(
    self, images: jax.Array, *, drop_path_noise: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """(B, H, W, channels) images -> (B, num_classes) float32 logits, or (B, C) without a head.

    Args:
      images: normalised, of this model's image size.
      drop_path_noise: from the method of that name; None (evaluation) switches drop path off.
      train: with a BatchNorm, normalise by the batch and update the running statistics.
    """
    x = self.pooled(images, drop_path_noise)
    if self.fc_norm is not None:
      x = self.fc_norm(x)
    if self.head_norm is not None:
      x = self.head_norm(x, use_running_average=not train)
    return widen(x) if self.head is None else self.head(x)
