"""How a run was started, in `config.json`: command, versions, devices, commit, config.

jax is imported where it is needed, so that `--help` stays fast.
"""

import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from hivit_jax.errors import UserError
from hivit_jax.reporting.files import replace
from hivit_jax.settings import dotted

_log = logging.getLogger(__name__)

_PACKAGES = (
  'hivit-jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'ml_collections',
  'numpy', 'pillow', 'tensorflow-datasets', 'tensorboard',
)  # fmt: skip
ABSENT = '(absent)'


def config_changes(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Compares a config with the one that `write_run_info` recorded.

  Returns:
    (recorded, now) by dotted key, such as `optim.lr`, for the keys that differ; ABSENT stands for
    a key that one of them does not have. Empty if nothing was recorded.
  """
  info = _read_run_info(pathlib.Path(workdir) / 'config.json')
  if info is None:
    return {}
  old, new = dotted(info['config']), dotted(_plain(config))
  return {
    key: (old.get(key, ABSENT), new.get(key, ABSENT))
    for key in dict.fromkeys([*new, *old])
    if old.get(key, ABSENT) != new.get(key, ABSENT)
  }


def write_run_info(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Records in `config.json` how the run was started; a resumed run is added to the list there.

  The file has `config`, the newest resolved config, and `runs`: for each start the time, the
  command line, versions, devices, the git commit of the code if it is in a checkout, and what had
  changed in the config.

  Args:
    workdir: where the file goes; created if needed.
    config: nested dicts; what JSON does not know is written as a string.

  Returns:
    What `config_changes` finds between the run before and this one.

  Raises:
    UserError: the file cannot be written.
  """
  path = pathlib.Path(workdir) / 'config.json'
  changes = config_changes(workdir, config)
  info = _read_run_info(path) or {'runs': []}
  run = _describe_run() | {'changed': {key: list(pair) for key, pair in changes.items()}}
  content = {'config': _plain(config), 'runs': [*info['runs'], run]}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(content, indent=2).encode() + b'\n')
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}; choose another --workdir') from error
  return changes


def _read_run_info(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    info = json.loads(path.read_bytes())
    if isinstance(info['config'], dict) and isinstance(info['runs'], list):
      return info
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (ValueError, TypeError, KeyError):
    pass
  _log.warning('%s was not written by this program; it is not compared, and will be replaced', path)
  return None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config as JSON returns it: tuples are lists, keys are strings."""
  return json.loads(json.dumps(config, default=str))


def _describe_run() -> dict[str, Any]:
  import jax

  versions = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  devices = jax.devices()
  return {
    'started': datetime.now().astimezone().isoformat(timespec='seconds'),
    'command': shlex.join([pathlib.Path(sys.executable).name, *sys.argv]),
    'git': _git_state(pathlib.Path(__file__)),
    'python': platform.python_version(),
    'platform': platform.platform(),
    'versions': versions,
    'devices': {
      'kind': devices[0].device_kind,
      'count': len(devices),
      'processes': jax.process_count(),
    },
  }


def _git_state(file: pathlib.Path) -> dict[str, Any] | None:
  """The commit of the checkout that tracks `file`, and whether there are changes; or None.

  A file that lies inside some checkout without being part of it (an environment in a project's
  folder) says nothing about the code.
  """

  def git(*arguments: str) -> str:
    command = ['git', '-C', str(file.parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

  try:
    git('ls-files', '--error-unmatch', file.name)
    return {'commit': git('rev-parse', 'HEAD'), 'dirty': bool(git('status', '--porcelain'))}
  except (OSError, subprocess.SubprocessError):
    return None
