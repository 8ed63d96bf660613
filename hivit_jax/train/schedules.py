"""Learning rate as a function of the fractional epoch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ('cosine', 'multistep')
SCALED = ('rate', 'peak')


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Linear warmup to a peak, then half a cosine or steps: `schedule(epoch)`.

  Some official loops count epochs from 1 or set the rate after the update; here the first step is
  at epoch 0, and the end of the curve is reached exactly at `epochs`.

  Attributes:
    lr: peak, which the warmup leads to.
    warmup_start_lr: at epoch 0.
    warmup_epochs: length of the warmup; less than `epochs`.
    epochs: length of the run.
    name: 'cosine' or 'multistep'.
    end_lr: of the cosine, at `epochs` and beyond.
    warmup_prefix: the cosine starts after the warmup (MAE). If not, it counts from epoch 0 and the
      warmup hides its beginning, so the rate drops where the warmup ends (Swin, SimMIM, supervised
      HiViT). The name is timm's.
    milestones: epochs from which on the rate of 'multistep' is multiplied by `milestone_factor`.
    milestone_factor: once for each milestone.
    scaled: what the factor of a layer scales: 'rate', the whole curve (MAE, BEiT), or 'peak'
      alone, so that all layers share start and end of the curve (SimMIM).
  """

  lr: float
  warmup_start_lr: float
  warmup_epochs: float
  epochs: float
  name: str = 'cosine'
  end_lr: float = 0.0
  warmup_prefix: bool = True
  milestones: tuple[float, ...] = ()
  milestone_factor: float = 0.1
  scaled: str = 'rate'

  def __call__(self, epoch: Any, scale: float = 1.0) -> Any:
    """The learning rate, an affine function of `scale`.

    Args:
      epoch: number or array; float32 inside JAX, float64 for what is no array of JAX.
      scale: factor of the layer, see `optim.layer_scales`.

    Returns:
      An array of the shape of `epoch`.
    """
    if self.scaled == 'peak':
      return self._curve(epoch, scale * self.lr)
    return scale * self._curve(epoch, self.lr)

  def _curve(self, epoch: Any, peak: float) -> Any:
    xp: Any = jnp if isinstance(epoch, jax.Array) else np
    warmup = self.warmup_start_lr + (peak - self.warmup_start_lr) * epoch / max(
      self.warmup_epochs, 1e-9
    )
    if self.name == 'multistep':
      passed = sum(xp.where(epoch >= milestone, 1.0, 0.0) for milestone in self.milestones)
      after = peak * self.milestone_factor**passed
    else:
      first = self.warmup_epochs if self.warmup_prefix else 0.0
      progress = xp.clip((epoch - first) / (self.epochs - first), 0, 1)
      after = self.end_lr + (peak - self.end_lr) * 0.5 * (1 + xp.cos(xp.pi * progress))
    return xp.where(epoch < self.warmup_epochs, warmup, after)
