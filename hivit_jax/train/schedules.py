"""Learning rate as a function of the fractional epoch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def warmup_cosine(
  *, lr: float, end_lr: float, warmup_start_lr: float, warmup_epochs: float, epochs: float
) -> Callable[[jax.Array | float], jax.Array]:
  """Linear warmup from `warmup_start_lr` to `lr`, then half a cosine to `end_lr`.

  The official loop counts epochs from 1, so its rate runs one epoch ahead and past the end; here
  the first step is at epoch 0 and `end_lr` is reached exactly at `epochs`.

  Args:
    lr: peak, reached after `warmup_epochs`.
    end_lr: at `epochs` and beyond.
    warmup_start_lr: at epoch 0.
    warmup_epochs: length of the warmup; less than `epochs`.
    epochs: length of the run.

  Returns:
    A function from the fractional epoch to the learning rate.
  """

  def schedule(epoch):
    warmup = warmup_start_lr + (lr - warmup_start_lr) * epoch / max(warmup_epochs, 1e-9)
    progress = jnp.clip((epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9), 0, 1)
    cosine = end_lr + (lr - end_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(epoch < warmup_epochs, warmup, cosine)

  return schedule
