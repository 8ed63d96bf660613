"""Training from Python, by the name of a recipe: what `hivit_jax.run` does."""

import importlib
import os
import pathlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import ml_collections

from hivit_jax import settings
from hivit_jax.buckets.bucket import is_address
from hivit_jax.errors import UserError, suggest
from hivit_jax.runtime import compilation_cache
from hivit_jax.train import run as runs

# A link to configs/ in a checkout, a copy of it in a wheel.
_CONFIGS = 'hivit_jax.configs'
_NO_RECIPES = {'base', 'recipes', 'variants'}


def run(
  config: str | ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  overrides: Mapping[str, Any] | None = None,
) -> pathlib.Path | str:
  """Trains what a config describes, as `main.py` does: the same call again resumes.

  It blocks until the run ends; an interrupt, such as a notebook's stop button, saves a checkpoint
  first. Call it from the main thread of a single process; runs of several processes need `main.py`.
  Compiled programs are kept on disk for the next run.

  Args:
    config: the name of a recipe, with its variant after a colon, such as 'mae_hivit_b:800' or
      'demo:finetune'; or a ConfigDict, which stays as it is.
    workdir: directory of everything that the run leaves, created if needed; or an address in a
      bucket, such as 'gs://bucket/runs/mae'.
    overrides: dotted settings, such as {'batch_size': 256, 'optim.lr': 1e-3}.

  Returns:
    The absolute path of `workdir`, or its address, for `create_model(weights=...)`.

  Raises:
    UserError: an unknown recipe or setting, a value that does not fit, or what else a run refuses.
    Stopped: after an interrupt or SIGTERM, with a checkpoint saved.
  """
  if isinstance(config, str):
    own = recipe(config)
  elif isinstance(config, ml_collections.ConfigDict):
    own = config.copy_and_resolve_references()
  else:
    kind = type(config).__name__
    raise UserError(f'config is of type {kind}: expected the name of a recipe, or a ConfigDict')
  overrides = overrides or {}
  for key, value in overrides.items():
    _override(own, key, value)
  if isinstance(workdir, str) and is_address(workdir):
    place: pathlib.Path | str = workdir
  else:
    place = pathlib.Path(workdir).expanduser().absolute()
  compilation_cache.turn_on()
  runs.train(own, str(place), overrides.keys())
  return place


def recipe(name: str) -> ml_collections.ConfigDict:
  """The config of a recipe, to be changed and given to `run`.

  Args:
    name: a file of configs/, without its ending, and perhaps a variant after a colon.

  Raises:
    UserError: there is no such recipe, or it has no such variant.
  """
  file, _, variant = name.partition(':')
  package = importlib.import_module(_CONFIGS)
  known = {module.name for module in pkgutil.iter_modules(package.__path__)} - _NO_RECIPES
  if file not in known:
    raise UserError(
      f'there is no recipe "{file}"{suggest(file, known)}; known: {", ".join(sorted(known))}; of a '
      'file of your own, give the ConfigDict that its get_config() returns'
    )
  return importlib.import_module(f'{_CONFIGS}.{file}').get_config(variant or None)


def _override(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
  settings.check_key(config, key, key)
  *path, last = key.split('.')
  section = settings.get(config, '.'.join(path)) if path else config
  default, kind = section[last], section.get_type(last)
  if isinstance(default, ml_collections.ConfigDict):
    raise UserError(f'{key}={value}: this is a section; give {key}.{next(iter(default))} or others')
  try:
    value = tuple(value) if kind is tuple and isinstance(value, list) else value
    section.update({last: value})
  except (TypeError, ValueError) as error:
    example = '' if default is None else f' such as {default!r}'
    raise UserError(f'{key}={value!r}: expected {kind.__name__}{example}') from error
