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
from hivit_jax.errors import Stopped, UserError
from hivit_jax.reporting.files import replace
from hivit_jax.reporting.tensorboard import EventFile
from hivit_jax.reporting.writer import Writer

_log = logging.getLogger(__name__)
_PROJECT = 'hivit_jax'
_IDS = 'trackers.json'
_GONE = ('RESOURCE_DOES_NOT_EXIST', 'INVALID_PARAMETER_VALUE')  # MLflow of a run that was deleted


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
    writer = _factory(name)(workdir, start_step, config)
    yield writer if name == 'tensorboard' else _Careful(name, writer)


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
  own = _ids(workdir).get('wandb') or uuid.uuid4().hex[:12]
  try:
    run = package.init(
      project=os.environ.get('WANDB_PROJECT', _PROJECT),
      id=own,
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
  _keep_id(workdir, 'wandb', own)
  # W&B's own steps never go back; those of a run that was killed and resumed do.
  run.define_metric('step')
  run.define_metric('*', step_metric='step')
  return _Wandb(run, package.Image)


class _Wandb:
  def __init__(self, run: Any, image_type: Callable[[Any], Any]):
    self._run, self._image_type = run, image_type

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    self._run.log({'step': step, **scalars})

  def write_image(self, step: int, tag: str, image: Any) -> None:
    self._run.log({'step': step, tag: self._image_type(image)})

  def close(self, error: BaseException | None = None) -> None:
    self._run.finish(exit_code=0 if error is None else 1)


def mlflow(workdir: pathlib.Path, start_step: int, config: Mapping[str, Any]) -> Writer:
  """A run of MLflow; a resumed run goes on with its id.

  `MLFLOW_TRACKING_URI` (default: MLflow's own) and `MLFLOW_EXPERIMENT_NAME` (default hivit_jax)
  are read. Steps between the last checkpoint and a kill are recorded twice.

  Raises:
    UserError: the package is absent, or the server or file cannot be used.
  """
  # If its server cannot be reached, MLflow retries for minutes, and training waits.
  os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '1')
  os.environ.setdefault('MLFLOW_HTTP_REQUEST_TIMEOUT', '10')
  try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
  except ImportError as error:
    raise _absent('mlflow', 'mlflow') from error
  name = os.environ.get('MLFLOW_EXPERIMENT_NAME', _PROJECT)
  own = _ids(workdir).get('mlflow')
  try:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(name)
    where = experiment.experiment_id if experiment else client.create_experiment(name)
    run = own or client.create_run(where, run_name=workdir.name).info.run_id
    client.update_run(run, status='RUNNING')
    known = client.get_run(run).data.params  # MLflow refuses another value
    flat = {key: str(value)[:500] for key, value in settings.dotted(config).items()}
    params = [Param(key, value) for key, value in flat.items() if key not in known]
    for start in range(0, len(params), 100):  # as many as MLflow takes
      client.log_batch(run, params=params[start : start + 100])
  except Exception as error:
    uri = os.environ.get('MLFLOW_TRACKING_URI', 'not set')
    gone = own and getattr(error, 'error_code', '') in _GONE
    instead = f', or delete {workdir}/{_IDS} to begin a new run' if gone else ''
    raise UserError(
      f'trackers=mlflow: {_first_line(error)} (MLFLOW_TRACKING_URI is {uri}){instead}'
    ) from error
  _keep_id(workdir, 'mlflow', run)
  return _Mlflow(client, run, Metric)


class _Mlflow:
  def __init__(self, client: Any, run: str, metric_type: Callable[..., Any]):
    self._client, self._run, self._metric_type = client, run, metric_type

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    now = time.time_ns() // 10**6
    metrics = [self._metric_type(name, value, now, step) for name, value in scalars.items()]
    self._client.log_batch(self._run, metrics=metrics)

  def write_image(self, step: int, tag: str, image: Any) -> None:
    self._client.log_image(self._run, image, artifact_file=f'{tag}/step_{step:08d}.png')

  def close(self, error: BaseException | None = None) -> None:
    failed = 'KILLED' if isinstance(error, Stopped) else 'FAILED'
    self._client.set_terminated(self._run, 'FINISHED' if error is None else failed)


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

  def close(self, error: BaseException | None = None) -> None:
    self._try(lambda: self._writer.close(error))

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


def _ids(workdir: pathlib.Path) -> dict[str, str]:
  """The ids that this run has with trackers."""
  path = workdir / _IDS
  try:
    known = json.loads(path.read_bytes()) if path.exists() else {}
    if isinstance(known, dict):
      return known
  except ValueError:
    pass
  raise UserError(f'{path} is damaged: delete it to begin a new run with the trackers')


def _keep_id(workdir: pathlib.Path, tracker: str, run: str) -> None:
  known = _ids(workdir)
  if known.get(tracker) != run:
    replace(workdir / _IDS, json.dumps(known | {tracker: run}, indent=2).encode() + b'\n')


def _absent(tracker: str, package: str) -> UserError:
  return UserError(f'trackers={tracker} needs a package that is absent: pip install {package}')


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), '') or type(error).__name__
