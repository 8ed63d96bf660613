"""Learning rate as a function of time, in steps or in epochs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ('cosine', 'poly', 'step')
SCALED = ('rate', 'peak')


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Linear warmup to a peak, then a curve down: `schedule(time)`.

  Time is counted in one unit, steps or epochs, and so are all lengths. Some official loops count
  epochs from 1 or set the rate after the update; here the first step is at time 0, and the end of
  the curve is reached exactly at `length`.

  Attributes:
    lr: peak, which the warmup leads to.
    warmup_start_lr: at time 0.
    warmup: length of the warmup; less than `length`.
    length: of the run.
    name: 'cosine', half a cosine; 'poly', a power of the time that is left, as in mmsegmentation:
      it begins at time 0, and the warmup scales it; 'step', as in mmdetection.
    end_lr: of 'cosine' and 'poly', at `length` and beyond.
    warmup_prefix: the cosine starts after the warmup (MAE). If not, it counts from time 0 and the
      warmup hides its beginning, so the rate drops where the warmup ends (Swin, SimMIM, supervised
      HiViT). The name is timm's.
    power: of 'poly'; 1 is a straight line.
    milestones: times from which on the rate of 'step' is multiplied by `milestone_factor`.
    milestone_factor: once for each milestone.
    scaled: what the factor of a layer scales: 'rate', the whole curve (MAE, BEiT), or 'peak'
      alone, so that all layers share start and end of the curve (SimMIM).
  """

  lr: float
  warmup_start_lr: float
  warmup: float
  length: float
  name: str = 'cosine'
  end_lr: float = 0.0
  warmup_prefix: bool = True
  power: float = 1.0
  milestones: tuple[float, ...] = ()
  milestone_factor: float = 0.1
  scaled: str = 'rate'

  def __call__(self, time: Any, scale: float = 1.0) -> Any:
    """The learning rate, an affine function of `scale`.

    Args:
      time: number or array; float32 inside JAX, float64 for what is no array of JAX.
      scale: factor of the layer, see `optim.layer_scales`.

    Returns:
      An array of the shape of `time`.
    """
    if self.scaled == 'peak':
      return self._curve(time, scale * self.lr)
    return scale * self._curve(time, self.lr)

  def _curve(self, time: Any, peak: float) -> Any:
    xp: Any = jnp if isinstance(time, jax.Array) else np
    risen = time / max(self.warmup, 1e-9)
    if self.name == 'poly':
      # What is left, and not what has passed, keeps the digits of small rates.
      left = xp.clip((self.length - time) / self.length, 0, 1)
      curve = lambda top: self.end_lr + (top - self.end_lr) * left**self.power  # noqa: E731
      start = self.warmup_start_lr / self.lr * curve(self.lr) if self.lr else 0.0
      warmup = start + (curve(peak) - start) * risen
      return xp.where(time < self.warmup, warmup, curve(peak))
    warmup = self.warmup_start_lr + (peak - self.warmup_start_lr) * risen
    if self.name == 'step':
      passed = sum(xp.where(time >= milestone, 1.0, 0.0) for milestone in self.milestones)
      after = peak * self.milestone_factor**passed
    else:
      first = self.warmup if self.warmup_prefix else 0.0
      progress = xp.clip((time - first) / (self.length - first), 0, 1)
      after = self.end_lr + (peak - self.end_lr) * 0.5 * (1 + xp.cos(xp.pi * progress))
    return xp.where(time < self.warmup, warmup, after)
