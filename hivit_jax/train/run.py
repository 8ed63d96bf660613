"""What `main.py` does with a config: train, or evaluate weights."""

import contextlib
import errno
import json
import logging
import pathlib
import shlex
import sys
from collections.abc import Collection, Iterator
from typing import Any

import jax
import ml_collections
from flax import nnx

from hivit_jax.errors import Stopped, UserError
from hivit_jax.interop import files, importer, torch_names
from hivit_jax.reporting import trackers
from hivit_jax.reporting.console import Progress, setup_logging
from hivit_jax.reporting.metrics import MetricWriter
from hivit_jax.reporting.run_info import config_changes, write_run_info
from hivit_jax.runtime import distributed, host_memory, memory, watchdog
from hivit_jax.runtime.signals import Interrupted, StopSignals
from hivit_jax.train import (
  assemble,
  best,
  evaluation,
  hints,
  initialise,
  loop,
  places,
  resume,
  sharding,
  step,
  validate,
  weights,
)
from hivit_jax.train.checkpoint import Checkpoints
from hivit_jax.train.setup import Setup, check_name, has_head, set_up

_log = logging.getLogger(__name__)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(config: ml_collections.ConfigDict, workdir: str, given: Collection[str] = ()) -> None:
  """Trains as the config says, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: see configs/base.py.
    workdir: directory of everything that the run leaves, created if needed; or gs://BUCKET/PATH or
      s3://BUCKET/PATH.
    given: dotted settings on the command line, for `hints.without_effect`.

  Raises:
    UserError: a setting, data set or checkpoint that does not fit, or another run in `workdir`:
      nothing was changed then; or a disk that is full.
    Stopped: after SIGTERM or SIGINT, with a checkpoint saved.
  """
  host_memory.keep_freed_memory(one_arena=assemble.is_large(config))
  primary = distributed.primary()
  setup_logging(primary)
  check_name(workdir)
  place = places.of(workdir)
  with (
    watchdog.Watch(),
    _told_of_full_memory(config),
    _told_of_full_disk(place),
    StopSignals() as signals,
    contextlib.ExitStack() as stack,
  ):
    try:
      with signals.interruptible():
        checked = validate.checked(config, given)
        ignored = hints.without_effect(checked, given)
        if ignored and primary:
          _log.warning('settings without effect in this run: %s', ', '.join(ignored))
        run = _begin(set_up(checked), place, stack)
    except Interrupted:
      raise Stopped(
        f'{signals.received}: stopped before training began; the same command starts it again'
      ) from None
    if run is None:
      return
    try:
      loop.train(run, signals)
    except loop.NonFiniteLoss as error:
      raise UserError(f'{error}; what helps: {hints.for_finite_numbers(config)}') from error
  broken = len(run.batches.broken)
  if broken:
    _log.warning('%d broken training images were replaced; each is named above', broken)
  if primary:
    _report(config, place, run.checkpoints.path(run.total_steps))


def evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | None,
  default_workdir: str,
  given: Collection[str] = (),
) -> None:
  """Evaluates weights and prints the metrics as JSON.

  It takes the newest checkpoint in `workdir` or, without one, of a run in `default_workdir`, else
  `config.init`; see `initialise.config_for` for the settings.

  Args:
    config: see configs/base.py. With k-NN accuracy and no other in it, nothing else is computed.
    workdir: a workdir, or one of its checkpoints.
    default_workdir: where `train` leaves what this config trains.
    given: dotted settings on the command line, which win over the run's.

  Raises:
    UserError: a setting, data set or file that does not fit.
  """
  host_memory.keep_freed_memory(one_arena=assemble.is_large(config))
  setup_logging(distributed.primary())
  with watchdog.Watch(), _told_of_full_memory(config):
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
  check_name(path)
  state = weights.read(path, ema=config.init_ema)
  setup = set_up(initialise.config_for(config, state, given), evaluated=state)
  graphdef, params = _evaluated(setup, state)
  context = evaluation.EvaluationContext(setup, graphdef, results=_place_of_results(path))
  evaluators = evaluation.evaluators(context)
  if not evaluators:
    raise UserError(
      f'{state.source} is {setup.config.model.name}, which has no classifier; evaluate its '
      'features with --config=configs/evaluate.py:knn or --config.knn.every_epochs=1'
    )
  metrics: dict[str, float] = {}
  for evaluator in evaluators:
    metrics |= evaluator.run(0, {'params': params}) or {}
  source = setup.eval_source
  shown = ', '.join(f'{name} {value:.4g}' for name, value in metrics.items())
  how = setup.task.protocol() or '{}x{} pixels'.format(*setup.config.image_size)
  _log.info(
    '%s at %s on %s of %s (%d examples): %s',
    state.source, how, source.split, source.name, len(source), shown,
  )  # fmt: skip
  return metrics


def _place_of_results(path: str) -> pathlib.Path:
  """Where evaluated weights leave results: in their run, or in the current directory."""
  run = pathlib.Path(path).expanduser()
  return run if (run / 'checkpoints').is_dir() else pathlib.Path.cwd()


def _evaluated(setup: Setup, state: files.StateDict) -> tuple[nnx.GraphDef, Any]:
  """Static half and parameters, on the devices, of the model that weights are for."""
  partial = setup.task.needs_classes and not has_head(state)  # for their features
  create = assemble.model_creator(setup.config, list(setup.mesh.devices.flat))
  model, _ = importer.load_new(create, state, partial=partial)
  graphdef, params = nnx.split(model)
  params = nnx.to_pure_dict(params)
  return graphdef, sharding.put(params, sharding.state_shardings(params, setup.mesh))


@contextlib.contextmanager
def _told_of_full_disk(place: places.Disk) -> Iterator[None]:
  """Turns the error into a UserError; checkpoints have their own."""
  try:
    yield
  except OSError as error:
    if error.errno not in _NO_ROOM:
      raise
    raise UserError(
      f'cannot write to {place.directory}: {error.strerror}; the checkpoints there are kept; '
      'make room (df -h) and start the same command again'
    ) from error


@contextlib.contextmanager
def _told_of_full_memory(config: ml_collections.ConfigDict) -> Iterator[None]:
  """Turns what JAX says when a device's memory is full into a UserError with the ways out."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UserError(
      f'a device ran out of memory: {distributed.first_line(error)}; what helps: '
      f'{hints.for_memory(config)}; what was saved is kept'
    ) from error


def _begin(setup: Setup, place: places.Disk, stack: contextlib.ExitStack) -> loop.Run | None:
  """The run at its first step or where it was left; None if it is finished; `stack` closes it."""
  config, mesh, steps = setup.config, setup.mesh, setup.steps
  primary = distributed.primary()
  validate.check_lengths(config, steps.epochs_per_step)
  training = assemble.training(
    config, mesh, chosen=setup.task, epochs_per_step=steps.epochs_per_step
  )
  memory.check_state(mesh, training.abstract)
  keep_best = config.checkpoint.keep_best
  total = config.max_steps or config.steps or steps.of(config.epochs)

  place.open(stack)
  directory = place.directory
  checkpoints = stack.enter_context(
    Checkpoints(
      directory / 'checkpoints',
      keep_last=config.checkpoint.keep_last,
      keep_every_steps=steps.between_kept(config.checkpoint),
      place=place,
    )
  )
  if place.shared:
    distributed.check_shared(directory)
  changes = config_changes(directory, config.to_dict())
  restored = resume.restore(checkpoints, training.abstract, changes)
  start = restored.step if restored else 0
  evaluated = restored is not None and restored.metadata['evaluated']
  if restored:
    resume.warn_of_changes(restored, changes, steps, total, bucketed=bool(config.detect.buckets))
  finished = start >= total and evaluated
  best.warn_of_change(keep_best, checkpoints.best, finished=finished)
  if finished:
    _log.info(
      'this run is finished: %s is at step %d of %d. To train longer: %s; to start over: another '
      '--workdir',
      checkpoints.path(start), start, total, hints.to_train_longer(config),
    )  # fmt: skip
    return None
  context = evaluation.EvaluationContext(setup, training.graphdef, directory)
  evaluators = evaluation.evaluators(context)  # before anything is written: data may not fit
  state = restored.state if restored else _initial_state(setup, training)
  if primary:
    write_run_info(directory, config.to_dict())
  examples = setup.train_source
  _log.info(
    '%s step %d of %d: %s, %d training examples of %s, %d evaluation examples, %s on %d x %s',
    'resuming at' if restored else 'starting at', start, total, config.model.name,
    len(examples), examples.name, len(setup.eval_source), assemble.compute_dtype(config),
    mesh.size, mesh.devices.flat[0].device_kind,
  )  # fmt: skip
  writer = stack.enter_context(
    MetricWriter(
      directory,
      start_step=start,
      primary=primary,
      tracked_by=config.trackers,
      config=config.to_dict(),
    )
  )
  context.writer = writer
  place.push()  # the ids of trackers: after a kill, the same command continues their runs
  return loop.Run(
    state=state,
    train_step=training.train_step,
    batches=stack.enter_context(setup.train_batches(start, total)),
    mesh=mesh,
    start_step=start,
    total_steps=total,
    batch_size=config.batch_size,
    epochs_per_step=steps.epochs_per_step,
    evaluators=evaluators,
    evaluated=evaluated,
    checkpoints=checkpoints,
    metadata={
      'config': config.to_dict(),
      'examples': len(examples),
      'class_names': list(examples.class_names),
    },
    save_every=steps.between_saves(config.checkpoint),
    keep_best=keep_best and best.KeepBest(keep_best, checkpoints),
    writer=writer,
    progress=stack.enter_context(Progress(total, start_step=start, primary=primary)),
    log_every=config.log_every_steps,
    for_data=hints.for_data(config),
  )


def _initial_state(setup: Setup, training: assemble.Training) -> step.State:
  config = setup.config
  if setup.task.without_weights and not config.init and distributed.primary():
    _log.warning('%s', setup.task.without_weights)
  create = initialise.initial_model(config, setup.train_source.class_names)
  state = step.init_state(create, training.optimizer, training.abstract)
  _log_overview(state['params'])
  return state


def _log_overview(params: Any) -> None:
  from clu import parameter_overview

  flat = {'/'.join(path): leaf for path, leaf in torch_names.flatten(params).items()}
  _log.info('\n%s', parameter_overview.get_parameter_overview(flat, include_stats=False))


def _report(config: ml_collections.ConfigDict, place: places.Disk, checkpoint: Any) -> None:
  shown = shlex.quote(str(place.shown(place.directory)))
  workdir = f'--workdir={shown}'
  python = pathlib.Path(sys.executable).name
  lines = [f'finished: checkpoint {checkpoint}']
  picture = evaluation.newest_picture(place.directory)
  if picture:
    lines.append(f'{picture.parent.name}: {picture}')
  if 'tensorboard' in trackers.listed(config.trackers):
    lines.append(f'curves: tensorboard --logdir={shown}/tensorboard')
  example = assemble.task_class(config).example
  if example:
    command = f'{python} -m hivit_jax.tools.{example.format(workdir=workdir)}'
    lines.append(f'next, try your own pictures: {command}')
  _log.info('%s', '\n  '.join(lines))
