"""How every command starts and ends: flags, and mistakes reported in one line."""

import contextlib
import importlib.util
import inspect
import io
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags

from hivit_jax import environment
from hivit_jax.errors import Stopped, UserError
from hivit_jax.settings import check_key

_EXIT_MISTAKE = 2
_EXIT_STOPPED = 143  # 128 + SIGTERM, as shells have it: job schedulers then start the job again


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
  """Parses the flags, calls `main(remaining arguments)` and exits.

  Exit status: 0 done, 1 a bug, 2 a user's mistake (one line on stderr), 143 stopped by a signal
  with everything saved.
  """
  # File and class names need not be in the encoding of a terminal or pipe.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')
  app.run(lambda arguments: _guarded(main, arguments), argv=argv, flags_parser=_parse)


def config_from_file(path: str) -> ml_collections.ConfigDict:
  """Runs `get_config` of a config file; `path` may end in `:variant`.

  Raises:
    UserError: there is no such file, or it is no config; names the line at fault.
  """
  name, *variant = path.split(':', 1)
  if not os.path.isfile(name):
    raise UserError(f'--config={path}: there is no file {name}; see configs/')
  spec = importlib.util.spec_from_file_location('config_file', name)
  if spec is None or spec.loader is None:
    raise UserError(f'--config={path}: {name} is not a Python file; see configs/')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UserError(f'--config={path}: {name} has no function get_config(); see configs/')
    if variant and not inspect.signature(module.get_config).parameters:
      raise UserError(f'--config={path}: {name} has no variants; leave out ":{variant[0]}"')
    config = module.get_config(*variant)
  except UserError:
    raise
  except Exception as error:  # anything that a file of the user's may raise
    raise UserError(f'--config={path}: {_place(error, name)}: {_reason(error)}') from error
  if not isinstance(config, ml_collections.ConfigDict):
    kind = type(config).__name__
    raise UserError(f'--config={path}: get_config() in {name} returned {kind}, not a ConfigDict')
  return config


def _place(error: Exception, file: str) -> str:
  """The last line of `file` that an error came through."""
  if isinstance(error, SyntaxError) and error.filename:
    return f'{error.filename}, line {error.lineno}'
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(file)]
  return f'{file}, line {lines[-1]}' if lines else file


def _reason(error: Exception) -> str:
  text = error.msg if isinstance(error, SyntaxError) else str(error.args[0] if error.args else '')
  # ml_collections shows the whole config in between.
  text = re.sub(r'Other fields present: .*?(Did you mean |$)', r'\1', text, flags=re.DOTALL)
  text = text[1:-1] if text[:1] == text[-1:] == "'" else text
  return f'{type(error).__name__}: {text.strip()}'


@contextlib.contextmanager
def writing(flag: str, path: Any) -> Iterator[None]:
  """UserError, with the flag that names the file, if the block cannot write it."""
  try:
    yield
  except (OSError, ValueError) as error:  # the latter: no format of pictures has such a suffix
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'cannot write --{flag}={path}: {reason}') from error


def given_settings(argv: Sequence[str]) -> frozenset[str]:
  """Dotted keys of the settings that a command line gives: --config.optim.lr=1 is optim.lr."""
  keys = {name for name, _ in _config_flags(argv)}
  keys |= {match[1] for arg in argv if (match := re.fullmatch(r'--?no(config\.[\w.]+)', arg))}
  return frozenset(key.removeprefix('config.') for key in keys - {'config'})


def _parse(argv: Sequence[str]) -> list[str]:
  file = config = None
  unset: dict[str, None] = {}
  try:
    # Looked at before absl does, whose messages are for developers of configs.
    if 'config' in flags.FLAGS:
      for name, value in _config_flags(argv):
        key = name.removeprefix('config.')
        if name == 'config':
          if file is not None:
            raise UserError(f'two configs, --config={file} and --config={value}: give one of them')
          file, config = value, config_from_file(value)
        elif config is not None:
          check_key(config, key, f'--config.{key}')
          if value == 'None':  # which absl would try to read as a number
            unset[key] = None
    argv = [arg for arg in argv if not re.fullmatch(r'--?config\.[\w.]+=None', arg)]
    try:
      remaining = flags.FLAGS(argv)
    except SystemExit:  # absl has printed the help, and would exit with 1
      sys.exit(0)
    if unset and (parsed := flags.FLAGS['config'].value) is not None:
      parsed.update_from_flattened_dict(unset)
    return remaining
  except UserError as error:
    _fail(error)
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    _fail(_wrong_value(config, str(error)) or error)


def _config_flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
  """('config', file) and ('config.optim.lr', value) from the command line, the file first."""
  found = []
  for argument, following in itertools.pairwise([*argv[1:], '']):
    match = re.fullmatch(r'--?(config(?:\.[\w.]+)?)(?:\[.*?\])?(?:=(.*))?', argument, re.DOTALL)
    if match:
      found.append((match[1], following if match[2] is None else match[2]))
  yield from sorted(found, key=lambda pair: pair[0] != 'config')


def _wrong_value(config: ml_collections.ConfigDict | None, message: str) -> UserError | None:
  """Says what a setting takes, from absl's message about a value that it could not parse."""
  match = re.match(r'flag --config\.([\w.]+)=(.*?): ', message, re.DOTALL)
  if config is None or not match:
    return None
  *path, last = match[1].split('.')
  section = config
  for part in path:
    section = section[part]
  kind, default = section.get_type(last), section[last]
  if isinstance(default, ml_collections.ConfigDict):
    expected = f'this is a section; set --config.{match[1]}.{next(iter(default))} and others in it'
  else:
    example = '' if default is None else f' such as {default!r}'
    expected = f'expected {kind.__name__}{example}'
  return UserError(f'--config.{match[1]}={match[2]}: {expected}')


def _guarded(main: Callable, argv: list[str]) -> None:
  try:
    environment.check_xla_flags()
    main(argv)
  except UserError as error:
    _fail(error)
  except Stopped as stop:
    _stop(str(stop))
  except KeyboardInterrupt:
    _stop('stopped; there was nothing to save')
  except ModuleNotFoundError:
    environment.check_packages()
    raise
  except Exception as error:
    mistake = environment.explain_devices(error)
    if mistake is None:
      raise
    _fail(mistake)


def _stop(message: str) -> NoReturn:
  print(message, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  # Not `sys.exit`, which joins every thread: one may be waiting for a disk that does not answer.
  os._exit(_EXIT_STOPPED)


def _fail(error: Exception) -> NoReturn:
  text = error.args[0] if isinstance(error, KeyError) and error.args else error
  print(f'error: {" ".join(str(text).split())}', file=sys.stderr)
  sys.exit(_EXIT_MISTAKE)
