"""Epochs as steps."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Steps:
  """Steps of a run, from epochs over a set of `examples`."""

  examples: int
  batch_size: int

  @property
  def epochs_per_step(self) -> float:
    return self.batch_size / self.examples

  def of(self, epochs: float) -> int:
    """Whole steps in so many epochs, at least one."""
    return max(1, round(epochs / self.epochs_per_step))

  def between_saves(self, checkpoint: Any) -> int | None:
    """Steps from one checkpoint to the next; None: there is only the one at the end."""
    return self.of(checkpoint.every_epochs) if checkpoint.every_epochs else None

  def between_kept(self, checkpoint: Any) -> int | None:
    """Steps between checkpoints that are kept for ever, a multiple of `between_saves`, or None."""
    save = self.between_saves(checkpoint)
    if not save or not checkpoint.keep_every_epochs:
      return None
    return save * max(1, round(checkpoint.keep_every_epochs / checkpoint.every_epochs))
