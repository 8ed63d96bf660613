"""Evaluation of weights without training."""

import json
import logging
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.interop import carried, files, importer, infer
from hivit_jax.reporting.console import setup_logging
from hivit_jax.runtime import distributed, host_memory, watchdog
from hivit_jax.train import assemble, hooks, initialise, inputs, run, sharding, validate, weights

_log = logging.getLogger(__name__)

# Settings of the machine and of this evaluation; all others come from the evaluated run.
_OWN = frozenset((
  'init', 'init_ema', 'mesh.data', 'mesh.fsdp', 'evaluation.batch_size',
  'data.num_threads', 'data.num_workers',
))  # fmt: skip


def evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | None,
  default_workdir: str,
  given: Collection[str] = (),
) -> None:
  """Evaluates weights and prints the metrics as JSON.

  Weights are those of the newest checkpoint in `workdir` or, without one, of a run in
  `default_workdir`, else of `config.init`. A run is evaluated with its own settings: its
  checkpoint's config replaces `config` except for what is `given`. Converted weights bring their
  model, image size and pixel statistics in the same way. For files of other code the config
  decides; if it names no model, names and shapes tell it.

  Args:
    config: see configs/base.py. With k-NN accuracy and no other in it, nothing else is computed.
    workdir: a workdir, or one of its checkpoints.
    default_workdir: where `run.run` leaves what this config trains.
    given: dotted settings that win over the run's.

  Raises:
    UserError: a setting, data set or file that does not fit.
  """
  host_memory.keep_freed_memory(one_arena=assemble.is_large(config))
  setup_logging(distributed.primary())
  with watchdog.Watch(), run.told_of_full_memory(config):
    metrics = _evaluate(config, workdir, default_workdir, given)
  if distributed.primary():
    print(json.dumps(metrics))


def _evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | None,
  default_workdir: str,
  given: Collection[str],
) -> dict[str, float]:
  trained = pathlib.Path(default_workdir, 'checkpoints').exists() and config.model.name is not None
  if workdir and config.init and 'init' in given:
    raise UserError(f'--workdir={workdir} and --config.init={config.init}: give one of them')
  path = workdir or (config.init if 'init' in given or not trained else default_workdir)
  if not path:
    raise UserError('what to evaluate? Give --workdir=DIRECTORY or --config.init=FILE')
  run.check_local(path)
  state = weights.read(path, ema=config.init_ema)
  validate.check(config)
  if 'config' in state.metadata:
    _as_trained(config, state.metadata['config'], given)
    validate.check(config)
  elif config.model.name is None or carried.read(state.metadata):
    initialise.infer_model(config, state, given)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  run.check_evaluation_batch(config, mesh)
  assemble.task(config)
  headless = infer.family(state.arrays) == 'backbone'
  with distributed.primary_first():
    source = inputs.open_source(config, config.data.eval_split)
  bank = inputs.open_source(config, config.data.train_split) if config.knn.every_epochs else source
  labelled = source
  if not headless and not assemble.is_pretraining(config) and config.evaluation.every_epochs:
    labelled = _labelled_as(state, source)
    inputs.set_num_classes(config, labelled)
  task = assemble.task(config)
  create = assemble.model_creator(config)
  model = create() if headless else nnx.eval_shape(create)
  importer.load_into(model, state, partial=headless)
  graphdef, params = nnx.split(model)
  params = nnx.to_pure_dict(params)
  on_devices = sharding.put(params, sharding.state_shardings(params, mesh))
  steps = assemble.Steps(len(bank), config.batch_size)
  told: set[str] = set()  # broken images, so that each is named once
  evaluations = [
    *([] if headless else hooks.accuracy_hook(config, task, graphdef, mesh, labelled, steps, told)),
    *hooks.knn_hook(config, task, graphdef, mesh, bank, source, steps, told),
  ]
  if not evaluations:
    raise UserError(
      f'{state.source} is {config.model.name}, which has no classifier; evaluate its features with '
      '--config=configs/evaluate.py:knn or --config.knn.every_epochs=1'
    )
  metrics: dict[str, float] = {}
  for evaluation in evaluations:
    metrics |= evaluation.run(0, {'params': on_devices})
  shown = ', '.join(f'{name} {value:.4g}' for name, value in metrics.items())
  _log.info(
    '%s at %dx%d pixels on %s of %s (%d examples): %s',
    state.source, *config.image_size, source.split, source.name, len(source), shown,
  )  # fmt: skip
  return metrics


def _labelled_as(state: files.StateDict, source: Any) -> Any:
  """The source with the labels of the weights' classes."""
  names = state.metadata.get('class_names')
  count = len(state.arrays['head.weight'])
  return inputs.with_classes_of(names, count, state.source, source)


def _as_trained(
  config: ml_collections.ConfigDict, trained: Mapping[str, Any], given: Collection[str]
) -> None:
  """Sets a config to that of a run, but for what is given or `_OWN`."""
  knn_alone = config.knn.every_epochs and not config.evaluation.every_epochs
  every = config.knn.every_epochs
  own = dict(validate.dotted(config))
  settings = infer.tuples(dict(validate.dotted(ml_collections.ConfigDict(trained))))
  theirs = {key: value for key, value in settings.items() if key in own and key not in _OWN}
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
