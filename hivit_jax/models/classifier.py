"""What makes an encoder a classifier."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from hivit_jax.ops import modules
from hivit_jax.ops.precision import at_least_float32


class Classifier:
  """Linear head on pooled features; the encoder has `pooled(images, noise=...)`.

  Args of `_add_head`:
    width: channels of the pooled features.
    num_classes: number of logits.
    std: standard deviation of the Linear's initial weights.
    batch_norm: a BatchNorm without scale and bias before the Linear: that of MAE's linear probe
      (arXiv 2111.06377, appendix A).
    dtype: of the encoder's computation; the head computes in at least float32.
  """

  pooled: Callable[..., jax.Array]
  fc_norm: nnx.Module | None = None

  def _add_head(
    self,
    width: int,
    num_classes: int,
    *,
    std: float,
    batch_norm: bool,
    rngs: nnx.Rngs,
    dtype: Any,
  ) -> None:
    self.head_norm = modules.batch_norm(width, rngs=rngs) if batch_norm else None
    # Not in bfloat16, in which several logits would be the largest.
    self.head = modules.linear(
      width, num_classes, std=std, rngs=rngs, dtype=at_least_float32(dtype)
    )

  def __call__(
    self, images: jax.Array, *, noise: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, num_classes) float32 logits.

    Args:
      images: of this model's image size.
      noise: from `drop_path_noise` in training; None (evaluation) switches drop path off.
      train: with a BatchNorm, normalise by the batch and update the running statistics.
    """
    x = self.pooled(images, noise=noise)
    if self.fc_norm is not None:
      x = self.fc_norm(x)
    if self.head_norm is not None:
      x = self.head_norm(x, use_running_average=not train)
    return self.head(x)
