"""What a run continues from, and what has changed since."""

import logging
from collections.abc import Mapping
from typing import Any

from hivit_jax.errors import UserError
from hivit_jax.train import hints
from hivit_jax.train.checkpoint import Checkpoints, Restored
from hivit_jax.train.manifest import Misfit
from hivit_jax.train.steps import Steps

_log = logging.getLogger(__name__)
# Settings that decide the order of examples, in any case and with buckets.
_ORDER = {'seed', 'batch_size', 'data.name', 'data.train_split'}
_BUCKETS = 'detect.buckets'
_BUCKETED = {
  _BUCKETS,
  *(
    f'detect.{key}'
    for key in ('short_sides', 'long_side', 'crop_first', 'crop_sides', 'scale_jitter')
  ),
}


def restore(
  checkpoints: Checkpoints, abstract: Any, changes: Mapping[str, tuple[Any, Any]]
) -> Restored | None:
  """The newest checkpoint; None if there is none.

  Args:
    checkpoints: of the run.
    abstract: the state that training needs, as shapes.
    changes: see `run_info.config_changes`.

  Raises:
    UserError: it does not fit the state; settings that have changed are named.
  """
  try:
    return checkpoints.restore(abstract)
  except Misfit as error:
    if changes:
      raise UserError(
        f'{error}. Changed since then: {"; ".join(_pairs(changes))}; to undo that: '
        f'{hints.as_before(changes)}'
      ) from error
    raise


def _pairs(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
  return [f'{key}: {old} -> {new}' for key, (old, new) in changes.items()]


def warn_of_changes(
  restored: Restored,
  changes: Mapping[str, tuple[Any, Any]],
  steps: Steps,
  total: int,
  *,
  bucketed: bool,
) -> None:
  """Says what differs from the run that saved the checkpoint, and what that does.

  Args:
    restored: the checkpoint.
    changes: see `run_info.config_changes`.
    steps: of the training examples.
    total: steps of the run.
    bucketed: the examples are in buckets now.
  """
  for pair in _pairs(changes):
    _log.warning('changed since this run was started: %s', pair)
  known = _ORDER | _BUCKETED if bucketed or _BUCKETS in changes else _ORDER
  reasons = sorted(known & changes.keys())
  before = restored.metadata['examples']
  if before != steps.examples:
    reasons.append(f'number of training examples ({before} -> {steps.examples})')
  if reasons and restored.step < total:
    _log.warning(
      'THE ORDER OF IMAGES CHANGES from here on, because of a new %s: the run differs from '
      'an uninterrupted one. Step %d was epoch %.2f and now counts as epoch %.2f',
      ', '.join(reasons),
      restored.step,
      restored.metadata['epoch'],
      restored.step * steps.epochs_per_step,
    )
