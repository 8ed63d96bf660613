"""One run from its config: set up, resume, train, report."""

import logging
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from hivit_jax.errors import UserError
from hivit_jax.interop import torch_names
from hivit_jax.train import build, hooks, host_memory, inputs, loop, settings, sharding, step
from hivit_jax.train.checkpoint import Checkpoints, Restored
from hivit_jax.train.logging import (
  MetricWriter,
  Progress,
  config_changes,
  setup_logging,
  write_run_info,
)

_log = logging.getLogger(__name__)
_ORDER = {'seed', 'batch_size', 'data.name', 'data.train_split'}  # settings that decide who is next


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains as the config says, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: see configs/base.py.
    workdir: directory of everything that the run leaves; created if needed.

  Raises:
    UserError: a setting, data set or checkpoint that does not fit; nothing was changed then.
    Stopped: after SIGTERM or SIGINT, with a checkpoint saved.
  """
  setup_logging()  # before JAX looks for devices, and has something to say about it
  primary = jax.process_index() == 0
  setup_logging(primary)
  settings.check(config)
  if jax.default_backend() == 'cpu':
    host_memory.keep_freed_memory()
  mesh = sharding.make_mesh(config.mesh.data)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
  if config.knn.every_epochs:
    sharding.check_batch_size(config.knn.batch_size, mesh, key='knn.batch_size')
  task = build.task(config)
  create = build.model_creator(config)
  graphdef, tx, abstract = step.abstract_state(create, build.optimizer(config), mesh)
  train_source, eval_source = inputs.open_sources(config)
  steps = build.Steps(len(train_source), config.batch_size)
  total = config.max_steps or steps.of(config.epochs)

  directory = pathlib.Path(workdir).expanduser().absolute()
  with Checkpoints(
    directory / 'checkpoints',
    keep_last=config.checkpoint.keep_last,
    keep_every_steps=steps.between_kept(config.checkpoint),
  ) as checkpoints:
    restored = _restore(checkpoints, abstract, config_changes(directory, config.to_dict()))
    start = restored.step if restored else 0
    evaluated = restored is not None and restored.metadata['evaluated']
    if restored:
      _warn_of_changes(restored, directory, config, steps, total)
    if start >= total and evaluated:
      _log.info(
        'this run is finished: %s is at step %d of %d. To train longer: a larger --config.epochs '
        'or --config.max_steps; to begin anew: another --workdir',
        checkpoints.path(start), start, total,
      )  # fmt: skip
      return
    if primary:
      write_run_info(directory, config.to_dict())
    if restored:
      state = restored.state
    else:
      state = step.init_state(build.initial_model(config), tx, mesh)
      _log_overview(state['params'])
    _log.info(
      '%s step %d of %d: %s, %d training examples of %s, %d evaluation examples, %s on %d x %s',
      'resuming at' if restored else 'starting at', start, total, config.model.name,
      len(train_source), train_source.name, len(eval_source), build.compute_dtype(config),
      mesh.size, mesh.devices.flat[0].device_kind,
    )  # fmt: skip
    train_step = step.make_train_step(
      graphdef,
      task,
      tx,
      build.schedule(config),
      epochs_per_step=steps.epochs_per_step,
      seed=config.seed,
      accumulate_steps=config.accumulate_steps,
      compiler_options=sharding.compiler_options(mesh),
    )
    with (
      MetricWriter(directory, start_step=start, primary=primary) as writer,
      Progress(total, start_step=start, primary=primary) as progress,
      inputs.train_batches(config, train_source, start, total) as batches,
    ):
      loop.run(
        state=state,
        train_step=train_step,
        batches=batches,
        mesh=mesh,
        start_step=start,
        total_steps=total,
        batch_size=config.batch_size,
        epochs_per_step=steps.epochs_per_step,
        hooks=[
          *hooks.knn_hook(config, task, graphdef, mesh, train_source, eval_source, steps),
          *hooks.picture_hook(config, graphdef, eval_source, steps, directory, writer),
        ],
        evaluated=evaluated,
        checkpoints=checkpoints,
        metadata={'config': config.to_dict(), 'examples': len(train_source)},
        save_every=steps.between_saves(config.checkpoint),
        writer=writer,
        progress=progress,
        log_every=config.log_every_steps,
      )
    if batches.broken:
      _log.warning(
        '%d broken training images were replaced by others; each is named above',
        len(batches.broken),
      )
    if primary:
      _report(directory, checkpoints.path(total))


def _restore(
  checkpoints: Checkpoints, abstract: Any, changes: Mapping[str, tuple[Any, Any]]
) -> Restored | None:
  try:
    return checkpoints.restore(abstract)
  except UserError as error:
    if changes:
      raise UserError(f'{error}. Changed since then: {"; ".join(_pairs(changes))}') from error
    raise


def _pairs(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
  return [f'{key}: {old} -> {new}' for key, (old, new) in changes.items()]


def _warn_of_changes(
  restored: Restored,
  directory: pathlib.Path,
  config: ml_collections.ConfigDict,
  steps: build.Steps,
  total: int,
) -> None:
  """Says what differs from the run that saved the checkpoint, and what that does."""
  changes = config_changes(directory, config.to_dict())
  for pair in _pairs(changes):
    _log.warning('changed since this run was started: %s', pair)
  reasons = sorted(_ORDER & changes.keys())
  before = restored.metadata['examples']
  if before != steps.examples:
    reasons.append(f'number of training examples ({before} -> {steps.examples})')
  if reasons and restored.step < total:
    _log.warning(
      'ANOTHER ORDER OF IMAGES from here on, for a new %s: the continued run is not what one '
      'uninterrupted run would be. Step %d was epoch %.2f, it counts as epoch %.2f now',
      ', '.join(reasons),
      restored.step,
      restored.metadata['epoch'],
      restored.step * steps.epochs_per_step,
    )


def _log_overview(params: Any) -> None:
  from clu import parameter_overview

  flat = {'/'.join(path): leaf for path, leaf in torch_names.flatten(params).items()}
  _log.info('\n%s', parameter_overview.get_parameter_overview(flat, include_stats=False))


def _report(directory: pathlib.Path, checkpoint: pathlib.Path) -> None:
  quoted = shlex.quote(str(directory))
  lines = [f'finished: checkpoint {checkpoint}']
  picture = hooks.newest_picture(directory)
  if picture:
    lines.append(f'reconstructions: {picture}')
  lines += [
    f'curves: tensorboard --logdir={quoted}/tensorboard',
    f'next, try your own pictures: {pathlib.Path(sys.executable).name} -m '
    f'hivit_jax.tools.reconstruct --workdir={quoted} --images=PICTURE.jpg --mask_ratio=0.6',
  ]
  _log.info('%s', '\n  '.join(lines))
