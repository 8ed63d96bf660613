"""Forms in which settings come: image sizes, keys with dots such as optim.lr, names of objects."""

import importlib
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


_OBJECT = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*')


def is_object(name: str | None) -> bool:
  """Whether a setting has the form of an object's name, package.module:Name."""
  return name is not None and _OBJECT.fullmatch(name) is not None


def find_object(name: str, key: str) -> Any:
  """The object `Name` of the module `package.module`.

  Args:
    name: package.module:Name.
    key: of the setting, for the error.

  Raises:
    UserError: there is no such module or object.
  """
  module, _, attribute = name.partition(':')
  try:
    loaded = importlib.import_module(module)
  except ModuleNotFoundError as error:
    if not f'{module}.'.startswith(f'{error.name}.'):
      raise  # it is there, and lacks something itself
    raise UserError(
      f'{key}={name}: there is no module {module}; it must lie in a directory of PYTHONPATH'
    ) from error
  if not hasattr(loaded, attribute):
    raise UserError(f'{key}={name}: {loaded.__file__} has no {attribute}')
  return getattr(loaded, attribute)
