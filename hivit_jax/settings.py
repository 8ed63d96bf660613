"""Forms in which settings come: image sizes, and keys with dots such as optim.lr."""

import operator
import re
from typing import Any

from hivit_jax.errors import UserError


def image_size(value: Any, name: str) -> tuple[int, int]:
  """(height, width) in pixels, from any form that people and files give it in.

  Args:
    value: one side, or two; as text '224', '224,320' or '224x320'.
    name: of the setting, for the error.

  Raises:
    UserError: not a size.
  """
  sides = value if isinstance(value, list | tuple) else [value]
  try:
    if isinstance(value, str):
      numbers = [int(side) for side in re.split('[x,]', value)]
    else:
      numbers = [operator.index(side) for side in sides]
  except (TypeError, ValueError):
    numbers = []
  if len(numbers) not in (1, 2) or min(numbers) <= 0:
    raise UserError(f'{name}={value}: expected a side or (height, width), in pixels')
  return numbers[0], numbers[-1]


def dotted(config: Any, prefix: str = '') -> dict[str, Any]:
  """The values of nested settings by dotted key, {'optim.lr': 1e-3, ...}.

  Args:
    config: a dict of dicts, or a ConfigDict.
    prefix: of all keys.
  """
  flat = {}
  for key, value in config.items():
    if hasattr(value, 'items') and value:
      flat |= dotted(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def get(config: Any, key: str) -> Any:
  """The value of a dotted key."""
  for part in key.split('.'):
    config = config[part]
  return config
