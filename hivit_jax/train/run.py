"""One run from its config: set up, resume, train, report."""

import contextlib
import errno
import logging
import pathlib
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import ml_collections

from hivit_jax.data.loader import PREFETCH
from hivit_jax.errors import Stopped, UserError
from hivit_jax.interop import torch_names
from hivit_jax.reporting.console import Progress, setup_logging
from hivit_jax.reporting.metrics import MetricWriter
from hivit_jax.reporting.run_info import config_changes, write_run_info
from hivit_jax.runtime import distributed, host_memory, lock, watchdog
from hivit_jax.runtime.signals import Interrupted, StopSignals
from hivit_jax.train import (
  assemble,
  hints,
  hooks,
  initialise,
  inputs,
  loop,
  memory,
  sharding,
  step,
  validate,
)
from hivit_jax.train.checkpoint import Checkpoints, Restored
from hivit_jax.train.manifest import Misfit

_log = logging.getLogger(__name__)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ORDER = {'seed', 'batch_size', 'data.name', 'data.train_split'}  # settings that decide who is next


def run(config: ml_collections.ConfigDict, workdir: str, given: Collection[str] = ()) -> None:
  """Trains as the config says, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: see configs/base.py.
    workdir: directory of everything that the run leaves; created if needed.
    given: dotted settings on the command line, for `hints.without_effect`.

  Raises:
    UserError: a setting, data set or checkpoint that does not fit, or another run in `workdir`:
      nothing was changed then; or a disk that is full.
    Stopped: after SIGTERM or SIGINT, with a checkpoint saved.
  """
  host_memory.keep_freed_memory(one_arena=assemble.is_large(config))
  primary = distributed.primary()
  setup_logging(primary)
  check_local(workdir)
  directory = pathlib.Path(workdir).expanduser().absolute()
  with (
    watchdog.Watch(),
    told_of_full_memory(config),
    _told_of_full_disk(directory),
    StopSignals() as signals,
    contextlib.ExitStack() as stack,
  ):
    try:
      with signals.interruptible():
        training = _set_up(config, directory, stack, given)
    except Interrupted:
      raise Stopped(
        f'{signals.received}: stopped before training began; the same command starts again'
      ) from None
    if training is None:
      return
    try:
      loop.run(**training, signals=signals)
    except loop.NonFiniteLoss as error:
      raise UserError(f'{error}; what helps: {hints.for_finite_numbers(config)}') from error
  broken = len(training['batches'].broken)
  if broken:
    _log.warning('%d broken training images were replaced by others; each is named above', broken)
  if primary:
    _report(config, directory, training['checkpoints'].path(training['total_steps']))


def check_local(path: str) -> None:
  """UserError for the address of a bucket."""
  if '://' in path:
    raise UserError(
      f'{path} is no path in the file system; mount the bucket (gcsfuse, s3fs) and give the path '
      'where it is mounted, or take a local disk or NFS'
    )
  if not path.isascii() and sys.getfilesystemencoding() != 'utf-8':  # Orbax's are always UTF-8
    raise UserError(
      f'{path} cannot be written: file names are {sys.getfilesystemencoding()} here; start with '
      'PYTHONUTF8=1 in the environment, or choose another --workdir'
    )


@contextlib.contextmanager
def _told_of_full_disk(directory: pathlib.Path) -> Iterator[None]:
  """Turns the error into a UserError; checkpoints have their own."""
  try:
    yield
  except OSError as error:
    if error.errno not in _NO_ROOM:
      raise
    raise UserError(
      f'cannot write to {directory}: {error.strerror}; the checkpoints there are kept; '
      'make room (df -h) and start the same command again'
    ) from error


@contextlib.contextmanager
def told_of_full_memory(config: ml_collections.ConfigDict) -> Iterator[None]:
  """Turns what JAX says when a device's memory is full into a UserError with the ways out."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UserError(
      f'a device has not enough memory: {distributed.first_line(error)}; what helps: '
      f'{hints.for_memory(config)}; what was saved is kept'
    ) from error


def _set_up(
  config: ml_collections.ConfigDict,
  directory: pathlib.Path,
  stack: contextlib.ExitStack,
  given: Collection[str],
) -> dict[str, Any] | None:
  """Makes the arguments of `loop.run`, or None if the run is finished; `stack` closes them."""
  primary = distributed.primary()
  validate.check(config)
  ignored = hints.without_effect(config, given)
  if ignored and primary:
    _log.warning('settings without effect in this run: %s', ', '.join(ignored))
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
  _check_images(config, mesh, 'batch_size')
  check_evaluation_batch(config, mesh)
  assemble.task(config)  # what is wrong with it is said before data are looked for
  with distributed.primary_first():  # embedded data sets are prepared
    train_source = inputs.open_source(config, config.data.train_split)
    eval_source = inputs.open_source(config, config.data.eval_split)
  inputs.set_num_classes(config, train_source)
  if not assemble.is_pretraining(config):
    inputs.check_classes(train_source.class_names, config.data.train_split, eval_source)
    inputs.check_labels(train_source)
  steps = assemble.Steps(len(train_source), config.batch_size)
  task, graphdef, optimizer, abstract, train_step = assemble.training(
    config, mesh, epochs_per_step=steps.epochs_per_step
  )
  memory.check_state(mesh, abstract)
  total = config.max_steps or steps.of(config.epochs)

  distributed.on_primary(lambda: stack.enter_context(lock.hold(directory)))
  checkpoints = stack.enter_context(
    Checkpoints(
      directory / 'checkpoints',
      keep_last=config.checkpoint.keep_last,
      keep_every_steps=steps.between_kept(config.checkpoint),
    )
  )
  distributed.check_shared(directory)
  restored = _restore(checkpoints, abstract, config_changes(directory, config.to_dict()))
  start = restored.step if restored else 0
  evaluated = restored is not None and restored.metadata['evaluated']
  if restored:
    _warn_of_changes(restored, directory, config, steps, total)
  if start >= total and evaluated:
    _log.info(
      'this run is finished: %s is at step %d of %d. To train longer: %s; to begin anew: another '
      '--workdir',
      checkpoints.path(start), start, total, hints.to_train_longer(config),
    )  # fmt: skip
    return None
  if restored:
    state = restored.state
  else:
    if config.task == 'linear' and not config.init and primary:
      _log.warning(
        'a linear probe of a random model, because config.init is not set; to probe a pretrained '
        'one: --config.init=WORKDIR'
      )
    state = step.init_state(
      initialise.initial_model(config, train_source.class_names), optimizer, abstract
    )
    _log_overview(state['params'])
  if primary:
    write_run_info(directory, config.to_dict())
  _log.info(
    '%s step %d of %d: %s, %d training examples of %s, %d evaluation examples, %s on %d x %s',
    'resuming at' if restored else 'starting at', start, total, config.model.name,
    len(train_source), train_source.name, len(eval_source), assemble.compute_dtype(config),
    mesh.size, mesh.devices.flat[0].device_kind,
  )  # fmt: skip
  told: set[str] = set()  # broken images of evaluations, so that each is named once
  writer = stack.enter_context(MetricWriter(directory, start_step=start, primary=primary))
  return {
    'state': state,
    'train_step': train_step,
    'batches': stack.enter_context(inputs.train_batches(config, train_source, start, total)),
    'mesh': mesh,
    'start_step': start,
    'total_steps': total,
    'batch_size': config.batch_size,
    'epochs_per_step': steps.epochs_per_step,
    'hooks': [
      *hooks.accuracy_hook(config, task, graphdef, mesh, eval_source, steps, told),
      *hooks.knn_hook(config, task, graphdef, mesh, train_source, eval_source, steps, told),
      *hooks.picture_hook(config, graphdef, mesh, eval_source, steps, directory, writer),
    ],
    'evaluated': evaluated,
    'checkpoints': checkpoints,
    'metadata': {
      'config': config.to_dict(),
      'examples': len(train_source),
      'class_names': list(train_source.class_names),
    },
    'save_every': steps.between_saves(config.checkpoint),
    'writer': writer,
    'progress': stack.enter_context(Progress(total, start_step=start, primary=primary)),
    'log_every': config.log_every_steps,
  }


def check_evaluation_batch(config: ml_collections.ConfigDict, mesh: Any) -> None:
  """UserError if batches of evaluations cannot be split over the devices, or do not fit there."""
  if config.evaluation.every_epochs or config.knn.every_epochs:
    key = 'evaluation.batch_size'
    sharding.check_batch_size(config.evaluation.batch_size, mesh, key=key)
    _check_images(config, mesh, key)


def _check_images(config: ml_collections.ConfigDict, mesh: Any, key: str) -> None:
  size = validate.get(config, key)
  channels = config.channels
  memory.check_images(mesh, config.image_size, channels, size, key, prefetched=PREFETCH)


def _restore(
  checkpoints: Checkpoints, abstract: Any, changes: Mapping[str, tuple[Any, Any]]
) -> Restored | None:
  try:
    return checkpoints.restore(abstract)
  except Misfit as error:
    if changes:
      raise UserError(
        f'{error}. Changed since then: {"; ".join(_pairs(changes))}; as before: '
        f'{hints.as_before(changes)}'
      ) from error
    raise


def _pairs(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
  return [f'{key}: {old} -> {new}' for key, (old, new) in changes.items()]


def _warn_of_changes(
  restored: Restored,
  directory: pathlib.Path,
  config: ml_collections.ConfigDict,
  steps: assemble.Steps,
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


def _report(
  config: ml_collections.ConfigDict, directory: pathlib.Path, checkpoint: pathlib.Path
) -> None:
  workdir = f'--workdir={shlex.quote(str(directory))}'
  python = pathlib.Path(sys.executable).name
  lines = [f'finished: checkpoint {checkpoint}']
  picture = hooks.newest_picture(directory)
  if picture:
    lines.append(f'reconstructions: {picture}')
  lines.append(f'curves: tensorboard --logdir={shlex.quote(str(directory))}/tensorboard')
  pretrained = assemble.is_pretraining(config)
  tool = 'reconstruct' if pretrained else 'predict'
  more = '--images=PICTURE.jpg --mask_ratio=0.6' if pretrained else 'PICTURE.jpg'
  lines.append(f'next, try your own pictures: {python} -m hivit_jax.tools.{tool} {workdir} {more}')
  _log.info('%s', '\n  '.join(lines))
