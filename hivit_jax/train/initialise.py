"""Configs and weights together: the model to begin with, and the config that weights are for."""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ml_collections

from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, files, importer, infer
from hivit_jax.train import assemble, weights

_log = logging.getLogger(__name__)


def initial_model(
  config: ml_collections.ConfigDict, class_names: Sequence[str]
) -> Callable[[], Any]:
  """Returns a function that builds the config's model with the weights of `config.init`.

  With `config.model.head_std`, the weights of the head are drawn anew even if they fit, as in the
  official finetuning; a head of other classes is drawn anew with its bias.

  Args:
    config: see configs/base.py.
    class_names: of the training data.
  """
  create = assemble.model_creator(config)
  path, ema = config.init, config.init_ema

  def load():
    model = create()
    if path:
      try:
        state = weights.read(path, ema=ema)
        importer.load_into(model, state, partial=True, redraw=_redrawn(config, state, class_names))
      except UserError as error:
        raise UserError(f'config.init: {error}') from error
    return model

  return load


def _redrawn(
  config: ml_collections.ConfigDict, state: files.StateDict, class_names: Sequence[str]
) -> dict[str, str]:
  """Parameters of the head that are not taken from the weights though they may fit, with why."""
  head = state.arrays.get('head.weight')
  if assemble.is_pretraining(config) or head is None or len(head) != config.model.num_classes:
    return {}
  result = {}
  if config.model.head_std is not None:
    result['head.weight'] = f'config.model.head_std={config.model.head_std}'
  names = state.metadata.get('class_names')
  if names and list(names) != list(class_names):
    return dict.fromkeys(('head.weight', 'head.bias'), 'the file is for other classes')
  if not names:
    _log.info(
      '%s has no class names but as many classes as the data, %d: assuming they are the same%s',
      state.source, len(head), ', though its weight is drawn anew' if result else '',
    )  # fmt: skip
  return result


def infer_model(
  config: ml_collections.ConfigDict, state: files.StateDict, given: Collection[str] = ()
) -> None:
  """Sets task, model and pixel statistics of a config to what weights are for.

  Args:
    config: see configs/base.py. Its image size becomes that of the weights if they carry it.
    state: the weights.
    given: dotted settings that win over what the weights say.
  """
  known = {key: value for key, value in config.model.items() if f'model.{key}' in given}
  if 'image_size' not in given:
    config.update(infer.known_size(state.metadata))
  described = carried.model_of(state, image_size=assemble.image_size(config), **known)
  name = described.name.removeprefix('backbone_')  # pooled, its features are those of a classifier
  if 'model.name' in given and config.model.name != name:
    raise UserError(
      f'config.model.name={config.model.name}, but {state.source} is for {name}; leave it out'
    )
  if name not in models.MODELS:
    raise UserError(f'{state.source} is for the model "{name}", which is none of those here')
  config.task = assemble.task_of(models.MODELS[name][0])
  config.channels = described.arguments['channels']
  config.model.name = name
  accepted = {key for key in infer.defaults(name) if key not in ('image_size', 'channels')}
  # Swin has a number of heads for each stage; other arguments have no setting.
  with config.model.ignore_type(), config.model.unlocked():
    config.model.update({k: v for k, v in described.arguments.items() if k in accepted})
  pixels = infer.tuples(infer.pixels(state.metadata))
  config.data.update({k: v for k, v in pixels.items() if f'data.{k}' not in given})
