"""How every command starts and ends: flags, and mistakes told in one line."""

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import app, flags

from hivit_jax.errors import Stopped, UserError, suggest

_EXIT_MISTAKE = 2
_EXIT_STOPPED = 143  # 128 + SIGTERM, as shells have it: job schedulers then start the job again


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
  """Parses the flags, calls `main(remaining arguments)` and exits.

  Exit status: 0 done, 1 a bug, 2 a mistake of the user's (one line on stderr), 143 stopped by a
  signal with everything saved.
  """
  app.run(lambda arguments: _guarded(main, arguments), argv=argv, flags_parser=_parse)


def config_from_file(path: str) -> ml_collections.ConfigDict:
  """Runs `get_config` of a config file; `path` may end in `:variant`.

  Raises:
    UserError: there is no such file, or it raised one.
  """
  name, *variant = path.split(':', 1)
  spec = importlib.util.spec_from_file_location('config_file', name)
  if spec is None or spec.loader is None:
    raise UserError(f'--config={path}: {name} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except FileNotFoundError:
    raise UserError(f'--config={path}: there is no file {name}; see configs/') from None
  return module.get_config(*variant)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except UserError as error:
    _fail(error)
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    _fail(_config_error(argv) or error)


def _config_error(argv: Sequence[str]) -> Exception | None:
  """A better account of what is wrong with the --config flags than the parser's."""
  text = '\n'.join(argv)
  files = re.findall(r'^--?config[=\n](\S+)$', text, re.MULTILINE)
  if not files:
    return None
  try:
    config = config_from_file(files[-1])
    for key in re.findall(r'^--?config\.([\w.]+)', text, re.MULTILINE):
      _check_key(config, key)
  except (UserError, AttributeError, KeyError) as error:
    return error
  return None


def _check_key(config: ml_collections.ConfigDict, key: str) -> None:
  node = config
  path = 'config'
  for part in key.split('.'):
    if not isinstance(node, ml_collections.ConfigDict) or part not in node:
      known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
      raise UserError(
        f'--config.{key}: {path} has no setting "{part}"{suggest(part, known)}; '
        f'it has: {", ".join(sorted(known)) or "no settings of its own"}'
      )
    node = node.get_ref(part).get() if part in node else None
    path += f'.{part}'


def _guarded(main: Callable, argv: list[str]) -> None:
  try:
    main(argv)
  except UserError as error:
    _fail(error)
  except Stopped as stop:
    print(stop, file=sys.stderr)
    sys.exit(_EXIT_STOPPED)


def _fail(error: Exception) -> None:
  text = error.args[0] if isinstance(error, KeyError) and error.args else error
  print(f'error: {" ".join(str(text).split())}', file=sys.stderr)
  sys.exit(_EXIT_MISTAKE)
