"""Experiment trackers: where metrics and pictures go besides the files of the workdir.

Their packages are optional and are imported where they are needed. Projects, accounts and servers
are set with the trackers' own environment variables.
"""

import json
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hivit_jax import settings
from hivit_jax.errors import UserError
from hivit_jax.reporting.files import replace
from hivit_jax.reporting.tensorboard import EventFile
from hivit_jax.reporting.writer import Writer

_log = logging.getLogger(__name__)
_PROJECT = 'hivit_jax'


def opened(
  names: Sequence[str], workdir: pathlib.Path, start_step: int, config: Mapping[str, Any]
) -> Iterator[Writer]:
  """Opens the trackers of `config.trackers`, one after the other.

  Args:
    names: `known` names; `package.module:Name` is called with the other three arguments.
    workdir: of the run.
    start_step: the step that the run goes on from.
    config: nested settings, which trackers show.

  Raises:
    UserError: a package is absent, or a tracker cannot be opened.
    OSError: a file in the workdir cannot be written.
  """
  for name in listed(names):
    yield _factory(name)(workdir, start_step, config)


def known(names: Sequence[str]) -> bool:
  """Whether there is a tracker of each of these names."""
  return all(name in TRACKERS or settings.is_imported(name) for name in listed(names))


def listed(names: Sequence[str]) -> list[str]:
  """Single names of `config.trackers`, which a command line gives as wandb,mlflow."""
  return [name.strip() for entry in names for name in entry.split(',') if name.strip()]


def _factory(name: str) -> Callable[[pathlib.Path, int, Mapping[str, Any]], Writer]:
  if settings.is_imported(name):
    return settings.imported(name, 'trackers')
  return TRACKERS[name]


def tensorboard(workdir: pathlib.Path, start_step: int, config: Mapping[str, Any]) -> Writer:
  """Event files under `WORKDIR/tensorboard`."""
  return EventFile(workdir / 'tensorboard', start_step)


def wandb(workdir: pathlib.Path, start_step: int, config: Mapping[str, Any]) -> Writer:
  """A run of Weights & Biases; a resumed run goes on with its id.

  `WANDB_PROJECT` (default hivit_jax), `WANDB_ENTITY`, `WANDB_API_KEY` and `WANDB_MODE` are read.
  With `WANDB_MODE=offline`, `wandb sync WORKDIR/wandb/offline-run-*` sends the run later.

  Raises:
    UserError: the package or the login is absent.
  """
  try:
    import wandb as package
  except ImportError as error:
    raise _absent('wandb', 'wandb') from error
  try:
    run = package.init(
      project=os.environ.get('WANDB_PROJECT', _PROJECT),
      id=_run_id(workdir, 'wandb', lambda: uuid.uuid4().hex[:12]),
      name=os.environ.get('WANDB_NAME', workdir.name),
      resume='allow',
      dir=str(workdir),
      config=dict(config),
      allow_val_change=True,
      settings=package.Settings(silent=True, console='off'),
    )
  except Exception as error:  # among them a question for the key that nobody answers
    raise UserError(
      f'trackers=wandb: {_first_line(error)}; log in with `wandb login` or WANDB_API_KEY, or set '
      'WANDB_MODE=offline'
    ) from error
  # W&B's own steps never go back; those of a run that was killed and resumed do.
  run.define_metric('step')
  run.define_metric('*', step_metric='step')
  return _Careful('wandb', _Wandb(run, package.Image))


class _Wandb:
  def __init__(self, run: Any, image_type: Callable[[Any], Any]):
    self._run, self._image_type = run, image_type

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    self._run.log({'step': step, **scalars})

  def write_image(self, step: int, tag: str, image: Any) -> None:
    self._run.log({'step': step, tag: self._image_type(image)})

  def close(self) -> None:
    self._run.finish()


def mlflow(workdir: pathlib.Path, start_step: int, config: Mapping[str, Any]) -> Writer:
  """A run of MLflow; a resumed run goes on with its id.

  `MLFLOW_TRACKING_URI` (default: MLflow's own) and `MLFLOW_EXPERIMENT_NAME` (default hivit_jax)
  are read. Steps between the last checkpoint and a kill are recorded twice.

  Raises:
    UserError: the package is absent, or the server or file cannot be used.
  """
  # Asked for a server that is away, MLflow tries for minutes, in which no step is done.
  os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '1')
  try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
  except ImportError as error:
    raise _absent('mlflow', 'mlflow') from error
  name = os.environ.get('MLFLOW_EXPERIMENT_NAME', _PROJECT)
  try:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(name)
    where = experiment.experiment_id if experiment else client.create_experiment(name)

    def create() -> str:
      return client.create_run(where, run_name=workdir.name).info.run_id

    run = _run_id(workdir, 'mlflow', create)
    client.update_run(run, status='RUNNING')
    known = client.get_run(run).data.params  # MLflow refuses another value
    flat = {key: str(value)[:500] for key, value in settings.dotted(config).items()}
    params = [Param(key, value) for key, value in flat.items() if key not in known]
    for start in range(0, len(params), 100):  # as many as MLflow takes
      client.log_batch(run, params=params[start : start + 100])
  except Exception as error:
    uri = os.environ.get('MLFLOW_TRACKING_URI', 'not set')
    raise UserError(
      f'trackers=mlflow: {_first_line(error)} (MLFLOW_TRACKING_URI is {uri})'
    ) from error
  return _Careful('mlflow', _Mlflow(client, run, Metric))


class _Mlflow:
  def __init__(self, client: Any, run: str, metric_type: Callable[..., Any]):
    self._client, self._run, self._metric_type = client, run, metric_type

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    now = time.time_ns() // 10**6
    metrics = [self._metric_type(name, value, now, step) for name, value in scalars.items()]
    self._client.log_batch(self._run, metrics=metrics)

  def write_image(self, step: int, tag: str, image: Any) -> None:
    self._client.log_image(self._run, image, artifact_file=f'{tag}/step_{step:08d}.png')

  def close(self) -> None:
    self._client.set_terminated(self._run)


TRACKERS = {'tensorboard': tensorboard, 'wandb': wandb, 'mlflow': mlflow}


class _Careful:
  """A writer to a service: its failures are reported and never end the run."""

  def __init__(self, name: str, writer: Writer):
    self._name, self._writer = name, writer
    self._failing = False

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    self._try(lambda: self._writer.write(step, scalars))

  def write_image(self, step: int, tag: str, image: Any) -> None:
    self._try(lambda: self._writer.write_image(step, tag, image))

  def close(self) -> None:
    self._try(self._writer.close)

  def _try(self, action: Callable[[], None]) -> None:
    try:
      action()
      self._failing = False
    except Exception as error:
      if not self._failing:  # once, until it works again
        _log.warning(
          'tracker %s: %s; the run goes on, and metrics.jsonl has everything',
          self._name,
          _first_line(error),
        )
      self._failing = True


def _run_id(workdir: pathlib.Path, tracker: str, create: Callable[[], str]) -> str:
  """The id that this run has with a tracker: of `WORKDIR/trackers.json`, or a new one."""
  path = workdir / 'trackers.json'
  known = json.loads(path.read_bytes()) if path.exists() else {}
  if tracker not in known:
    known[tracker] = create()
    replace(path, json.dumps(known, indent=2).encode() + b'\n')
  return known[tracker]


def _absent(tracker: str, package: str) -> UserError:
  return UserError(f'trackers={tracker} needs a package that is absent: pip install {package}')


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), '') or type(error).__name__
