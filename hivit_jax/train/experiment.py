"""One run from its config: set up, resume, train, report."""

import logging
import pathlib
import shlex
import sys
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from hivit_jax.data.subset import Subset
from hivit_jax.interop import torch_names
from hivit_jax.tasks import knn, reconstruction
from hivit_jax.train import build, inputs, loop, sharding, step
from hivit_jax.train.checkpoint import Checkpoints
from hivit_jax.train.logging import MetricWriter, Progress, setup_logging, write_run_info

_log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains as the config says, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: see configs/base.py.
    workdir: directory of everything that the run leaves; created if needed.

  Raises:
    UserError: a setting, data set or checkpoint that does not fit.
    Stopped: after SIGTERM or SIGINT, with a checkpoint saved.
  """
  primary = jax.process_index() == 0
  setup_logging(primary)
  mesh = sharding.make_mesh(config.mesh.data)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
  task = build.task(config)
  create = build.model_creator(config)
  graphdef, tx, abstract = step.abstract_state(create, build.optimizer(config), mesh)
  train_source, eval_source = inputs.open_sources(config)
  steps = build.Steps(len(train_source), config.batch_size)
  total = config.max_steps or steps.of(config.epochs)

  directory = pathlib.Path(workdir).absolute()
  checkpoint = config.checkpoint
  with Checkpoints(
    directory / 'checkpoints',
    keep_last=checkpoint.keep_last,
    keep_every_steps=steps.of(checkpoint.keep_every_epochs)
    if checkpoint.keep_every_epochs
    else None,
  ) as checkpoints:
    restored = checkpoints.restore(abstract)
    if restored is None:
      state, start = step.init_state(build.initial_model(config), tx, mesh), 0
      _log_overview(state['params'])
    else:
      state, start = restored.state, restored.step
    changed = write_run_info(directory, config.to_dict()) if primary else []
    if restored is not None and changed:
      _log.warning('resuming with other settings than before: %s', ', '.join(changed))
    if start >= total:
      _log.info(
        'this run is finished: %s is at step %d of %d', checkpoints.path(start), start, total
      )
      return
    _log.info(
      '%s step %d of %d: %s, %d training examples of %s, %d evaluation examples, %s on %d x %s',
      'resuming at' if start else 'starting at', start, total, config.model.name,
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
    )
    with (
      MetricWriter(directory, start_step=start, primary=primary) as writer,
      Progress(total, start_step=start, primary=primary) as progress,
      inputs.train_batches(config, train_source, start, total) as batches,
    ):
      hooks = [
        *_knn_hook(config, task, graphdef, mesh, train_source, eval_source, steps),
        *_picture_hook(config, graphdef, eval_source, steps, directory, writer),
      ]
      loop.run(
        state=state,
        train_step=train_step,
        batches=batches,
        mesh=mesh,
        start_step=start,
        total_steps=total,
        batch_size=config.batch_size,
        epochs_per_step=steps.epochs_per_step,
        hooks=hooks,
        checkpoints=checkpoints,
        metadata={'config': config.to_dict(), 'epoch': total * steps.epochs_per_step},
        save_every=steps.of(checkpoint.every_epochs),
        writer=writer,
        progress=progress,
        log_every=config.log_every_steps,
      )
    if primary:
      _report(directory, checkpoints.path(total))


def _log_overview(params: Any) -> None:
  from clu import parameter_overview

  flat = {'/'.join(path): leaf for path, leaf in torch_names.flatten(params).items()}
  _log.info('\n%s', parameter_overview.get_parameter_overview(flat, include_stats=False))


def _knn_hook(config, task, graphdef, mesh, train_source, eval_source, steps) -> list[loop.Hook]:
  options = config.knn
  if not options.every_epochs:
    return []
  sharding.check_batch_size(options.batch_size, mesh, key='knn.batch_size')
  bank_source = Subset(train_source, options.bank_size)

  @jax.jit
  def features(params, images):
    return task.features(nnx.merge(graphdef, params), images)

  def collect(params, source):
    values, labels = [], []
    with inputs.eval_batches(config, source, options.batch_size) as batches:
      for batch in batches:
        arrays = sharding.put_batch(batch, mesh)
        keep = sharding.fetch(arrays['mask'])
        values.append(sharding.fetch(features(params, arrays['image']))[keep])
        labels.append(sharding.fetch(arrays['label'])[keep])
    return np.concatenate(values), np.concatenate(labels)

  def evaluate(_, params):
    bank, bank_labels = collect(params, bank_source)
    queries, labels = collect(params, eval_source)
    predicted = knn.knn_predict(
      bank,
      bank_labels,
      queries,
      num_classes=train_source.num_classes,
      k=options.k,
      temperature=options.temperature,
    )
    return {'eval/knn_top1': float(np.mean(predicted == labels))}

  return [loop.Hook(steps.of(options.every_epochs), evaluate)]


def _picture_hook(config, graphdef, eval_source, steps, directory, writer) -> list[loop.Hook]:
  options = config.pictures
  if not options.every_epochs or jax.process_index():
    return []
  source = Subset(eval_source, options.count)
  # Pictures are one process's business: its whole batch, no part of a global one.
  with inputs.eval_batches(config, source, len(source), alone=True) as batches:
    images = next(batches)['image']
  pictures = reconstruction.Reconstructor(
    graphdef, mean=tuple(config.data.mean), std=tuple(config.data.std)
  )

  def draw(at, params):
    result = pictures(sharding.local(params), images, seed=config.seed)
    picture = reconstruction.draw(result, title=f'{config.model.name}, step {at}')
    path = _picture_path(directory, at)
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    writer.write_image(at, 'reconstructions', np.asarray(picture))
    return {}

  return [loop.Hook(steps.of(options.every_epochs), draw)]


def _picture_path(directory: pathlib.Path, at: int) -> pathlib.Path:
  return directory / 'reconstructions' / f'step_{at:08d}.png'


def _report(directory: pathlib.Path, checkpoint: pathlib.Path) -> None:
  quoted = shlex.quote(str(directory))
  lines = [f'finished: checkpoint {checkpoint}']
  pictures = sorted((directory / 'reconstructions').glob('step_*.png'))
  if pictures:
    lines.append(f'reconstructions: {pictures[-1]}')
  lines += [
    f'curves: tensorboard --logdir={quoted}/tensorboard',
    f'next, try your own pictures: {pathlib.Path(sys.executable).name} -m '
    f'hivit_jax.tools.reconstruct --workdir={quoted} --images=PICTURE.jpg --mask_ratio=0.6',
  ]
  _log.info('%s', '\n  '.join(lines))
