"""The flags of tools that show images to a model: where its weights are."""

import os
from collections.abc import Sequence

from absl import flags

from hivit_jax.errors import UserError

WORKDIR = flags.DEFINE_string('workdir', None, 'Workdir of a model, or a checkpoint.')
WEIGHTS = flags.DEFINE_string('weights', None, 'A .pth or .safetensors file instead.')
EMA = flags.DEFINE_bool('ema', False, 'Use the averaged weights (EMA).')


def source() -> str:
  """Where the weights are; UserError where there are none or several."""
  if (WORKDIR.value is None) == (WEIGHTS.value is None):
    raise UserError("which model? Either a run's --workdir=DIRECTORY or --weights=FILE")
  return os.path.expanduser(WORKDIR.value or WEIGHTS.value or '')


def checked(argv: Sequence[str]) -> str:
  """As `source`; UserError where there are no images, either."""
  found = source()
  if not argv[1:]:
    raise UserError('which images? Name files or folders of them')
  return found
