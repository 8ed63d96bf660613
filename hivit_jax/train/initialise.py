"""Configs and weights together: the initial model, and the config that weights are for."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections

from hivit_jax import models, settings
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, files, importer, infer
from hivit_jax.train import assemble, validate, weights

_log = logging.getLogger(__name__)

# Settings of the machine and of an evaluation; all others come from the evaluated run.
_OWN = frozenset((
  'init', 'init_ema', 'mesh.data', 'mesh.fsdp', 'evaluation.batch_size',
  'data.num_threads', 'data.num_workers',
))  # fmt: skip


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
  path, ema, init_channels = config.init, config.init_ema, config.init_channels

  def load():
    model = create()
    if path:
      try:
        state = weights.read(path, ema=ema)
        importer.load_into(
          model,
          state,
          partial=True,
          redraw=_redrawn(config, state, class_names),
          init_channels=init_channels,
        )
      except UserError as error:
        raise UserError(f'config.init: {error}') from error
    return model

  return load


def _redrawn(
  config: ml_collections.ConfigDict, state: files.StateDict, class_names: Sequence[str]
) -> dict[str, str]:
  """Parameters of the head that are not taken from the weights though they may fit, with why."""
  head = state.arrays.get('head.weight')
  if head is None or len(head) != config.model.num_classes:
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


def config_for(
  config: ml_collections.ConfigDict, state: files.StateDict, given: Collection[str] = ()
) -> ml_collections.ConfigDict:
  """The config to evaluate weights with.

  Weights of a run bring its settings, except those of the machine; converted weights bring model,
  image size and pixel statistics. For weights of other code `config` decides; if it names no model,
  the model is inferred from names and shapes.

  Args:
    config: see configs/base.py; it stays as it is.
    state: the weights.
    given: dotted settings that win over what the weights say.
  """
  config = validate.checked(config)
  if 'config' in state.metadata:
    _as_trained(config, state.metadata['config'], given)
    config = validate.checked(config)
  elif config.model.name is None or carried.read(state.metadata):
    _as_inferred(config, state, given)
  return config


def _as_trained(
  config: ml_collections.ConfigDict, trained: Mapping[str, Any], given: Collection[str]
) -> None:
  """Sets a config to a run's, except for what is given or in `_OWN`."""
  knn_alone = config.knn.every_epochs and not config.evaluation.every_epochs
  every = config.knn.every_epochs
  own = settings.dotted(config)
  theirs = infer.tuples(settings.dotted(ml_collections.ConfigDict(trained)))
  theirs = {key: value for key, value in theirs.items() if key in own and key not in _OWN}
  if theirs.get('optim.schedule') == 'multistep':  # as older runs call it
    theirs['optim.schedule'] = 'step'
  with config.ignore_type():
    config.update_from_flattened_dict({k: v for k, v in theirs.items() if k not in given})
  if knn_alone:
    config.evaluation.every_epochs = 0.0
    config.knn.every_epochs = every
  elif not config.knn.every_epochs and 'evaluation.every_epochs' not in given:
    config.evaluation.every_epochs = 1.0  # the run may have done without; now it is asked for
  other = [
    f'{key}: {theirs[key]} -> {own[key]}'
    for key in sorted(theirs.keys() & set(given))
    if theirs[key] != own[key]
  ]
  if other:
    _log.info('overridden on the command line: %s', '; '.join(other))


def _as_inferred(
  config: ml_collections.ConfigDict, state: files.StateDict, given: Collection[str]
) -> None:
  """Sets task, model and pixel statistics of a config to what weights are for.

  Its image size becomes that of the weights if they carry it.
  """
  known = {key: value for key, value in config.model.items() if f'model.{key}' in given}
  if 'image_size' not in given:
    config.update(infer.known_size(state.metadata))
  described = carried.model_of(state, image_size=assemble.image_size(config), **known)
  name = described.name.removeprefix('backbone_')  # pooled, its features are those of a classifier
  if 'model.name' in given and config.model.name != name:
    raise UserError(
      f'config.model.name={config.model.name}, but {state.source} is for {name}; omit the setting'
    )
  if name not in models.MODELS:
    raise UserError(f'{state.source} is for the model "{name}", which this version does not have')
  config.task = assemble.task_of(models.MODELS[name][0])
  config.channels = described.arguments['channels']
  config.model.name = name
  accepted = {key for key in infer.defaults(name) if key not in ('image_size', 'channels')}
  # Swin has a number of heads for each stage; other arguments have no setting.
  with config.model.ignore_type(), config.model.unlocked():
    config.model.update({k: v for k, v in described.arguments.items() if k in accepted})
  pixels = infer.tuples(carried.pixels(state, described))
  config.data.update({k: v for k, v in pixels.items() if f'data.{k}' not in given})
