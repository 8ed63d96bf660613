"""The best checkpoint of a run: the one whose metric no other has reached."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from hivit_jax.errors import UserError
from hivit_jax.runtime import distributed
from hivit_jax.train.manifest import Best

_log = logging.getLogger(__name__)
_SETTING = 'config.checkpoint.keep_best'
_DIRECTIONS = ('max', 'min')


def parse(wanted: str) -> tuple[str, str]:
  """Metric and direction of 'eval/top1:max'; ValueError if it is something else."""
  metric, _, direction = wanted.rpartition(':')
  if not metric or direction not in _DIRECTIONS:
    raise ValueError(f'expected METRIC:max or METRIC:min, got {wanted!r}')
  return metric, direction


def warn_of_change(wanted: str | None, known: Best | None, *, finished: bool) -> None:
  """Says what setting, changing or removing `checkpoint.keep_best` does to a run that goes on.

  Args:
    wanted: the setting now.
    known: what the restored checkpoint says of the best.
    finished: there are no steps left.
  """
  if wanted is None and known is not None:
    _log.warning(
      '%s is no longer set: the best stays step %d (%s %.6g); later steps are not compared with it',
      _SETTING, known.step, known.of, known.value,
    )  # fmt: skip
  elif finished and wanted is not None and (known is None or known.of != wanted):
    _log.warning(
      '%s=%s comes too late: this run is finished, and its other steps are gone. If it is trained '
      'longer, it begins with the newest step',
      _SETTING, wanted,
    )  # fmt: skip


class KeepBest:
  """Tells `Checkpoints` which of them is the best.

  Attributes:
    known: the checkpoint that the run continues from has been compared with the others. If not,
      it is to be measured first.
  """

  def __init__(self, wanted: str, checkpoints: Any):
    """Goes on from the best that the restored checkpoint tells, if it is by the same metric.

    Args:
      wanted: metric and direction, such as 'eval/top1:max'.
      checkpoints: see `checkpoint.Checkpoints`, after `restore`.
    """
    self._wanted = wanted
    self._metric, self._direction = parse(wanted)
    self._checkpoints = checkpoints
    self.known = checkpoints.best is not None and checkpoints.best.of == wanted
    if not self.known:
      checkpoints.best = None

  def improved(self, step: int, metrics: Mapping[str, float], *, complete: bool) -> bool:
    """Whether a step is the best until now; the earlier of two that are equal stays it.

    The next checkpoint that is saved says so, which must be that of this step unless it has one.

    Args:
      step: that was evaluated.
      metrics: of this step.
      complete: there are no others in this run.

    Raises:
      UserError: the metric is unknown.
    """
    value = distributed.on_primary(lambda: self._better(metrics, complete))
    if value is None:
      return False
    self._checkpoints.best = Best(self._wanted, value, step)
    _log.info('step %d is the best until now: %s %.6g', step, self._metric, value)
    return True

  def _better(self, metrics: Mapping[str, float], complete: bool) -> float | None:
    """The value, if it is better."""
    if self._metric not in metrics:
      if not complete or self.known:  # a run with a best does not lose its steps for this
        return None
      raise UserError(
        f'{_SETTING}={self._wanted}: this run measures no {self._metric}; it measures '
        f'{", ".join(sorted(metrics)) or "nothing"}'
      )
    value, best = float(metrics[self._metric]), self._checkpoints.best
    if not math.isfinite(value):
      return None
    if best is None:
      return value
    better = value > best.value if self._direction == 'max' else value < best.value
    return value if better else None
