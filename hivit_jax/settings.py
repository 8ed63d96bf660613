"""Forms in which settings come: image sizes, keys with dots such as optim.lr, names in modules."""

import difflib
import importlib
import operator
import re
import traceback
from collections.abc import Sequence
from typing import Any

from hivit_jax.errors import UserError, suggest

DTYPES = ('uint8', 'uint16', 'float32')  # of stored pixels
MAX_CHANNELS = 64
RGB = 3  # channels


def is_picture(channels: int, dtype: str) -> bool:
  """Whether images are converted to RGB or grey bytes; all others are taken as they are stored."""
  return channels in (1, 3) and dtype == 'uint8'


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


def check_key(config: Any, key: str, given: str) -> None:
  """Raises UserError, with a suggestion, unless a config has the dotted key.

  Args:
    config: a ConfigDict.
    key: such as optim.lr.
    given: the key as the user wrote it, for the error.
  """
  node = config
  *path, _ = parts = key.split('.')
  for depth, part in enumerate(parts):
    if not hasattr(node, 'get_ref'):
      raise UserError(f'{given}: config.{".".join(path[:depth])} is a value, not a section')
    if part not in node:
      known = list(dict.fromkeys([*config, *dotted(config)]))
      close = [name for name in known if name.split('.')[-1] == parts[-1]] or known
      guess = suggest(key, close) or suggest(key, known) or _only(close)
      raise UserError(
        f'{given}: {".".join(["config", *path[:depth]])} has no setting "{part}"{guess}; '
        f'it has: {", ".join(sorted(node))}'
      )
    node = node.get_ref(part).get()


def _only(names: Sequence[str]) -> str:
  return f' (did you mean "{names[0]}"?)' if len(names) == 1 else ''


def is_imported(text: str) -> bool:
  """Whether a setting names something in a module: 'package.module:Name'."""
  return re.fullmatch(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*', text) is not None


def imported(text: str, key: str) -> Any:
  """What 'package.module:Name' names.

  Args:
    text: see `is_imported`.
    key: of the setting, for errors.

  Raises:
    UserError: the module cannot be imported, or has nothing of that name.
  """
  module_name, name = text.split(':')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:
    if isinstance(error, ModuleNotFoundError) and error.name in _parents(module_name):
      raise UserError(
        f'{key}={text}: there is no module {error.name}; is the folder that has it in PYTHONPATH?'
      ) from error
    place = traceback.extract_tb(error.__traceback__)[-1]
    raise UserError(
      f'{key}={text}: importing {module_name} fails with {type(error).__name__}: '
      f'{" ".join(str(error).split())} ({place.filename}, line {place.lineno})'
    ) from error
  if not hasattr(module, name):
    close = difflib.get_close_matches(name, dir(module), n=1)
    guess = f'; did you mean {module_name}:{close[0]}?' if close else ''
    raise UserError(f'{key}={text}: {module.__file__} has no {name}{guess}')
  return getattr(module, name)


def _parents(module_name: str) -> list[str]:
  """'a.b.c' -> ['a', 'a.b', 'a.b.c']."""
  steps = module_name.split('.')
  return ['.'.join(steps[: i + 1]) for i in range(len(steps))]
