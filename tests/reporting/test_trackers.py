"""Metrics also go to trackers, and a run that was killed stays one run there."""

import json
import re
import signal

import numpy as np
import pytest
from mlflow import MlflowClient

from hivit_jax.errors import Stopped, UserError
from hivit_jax.reporting import trackers
from hivit_jax.reporting.metrics import MetricWriter
from tests.runs import STEPS, last_step, metrics

OFFLINE = {'WANDB_MODE': 'offline'}


@pytest.fixture
def store(tmp_path, monkeypatch):
  """The environment of an MLflow file store."""
  environment = {
    'MLFLOW_TRACKING_URI': f'file:{tmp_path}/mlruns',
    'MLFLOW_ALLOW_FILE_STORE': 'true',
  }
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  return environment


def only_run(client):
  experiment = client.get_experiment_by_name('hivit_jax')
  (run,) = client.search_runs([experiment.experiment_id])
  return run


def history(client, name):
  points = client.get_metric_history(only_run(client).info.run_id, name)
  return {point.step: point.value for point in points}


def test_mlflow_gets_numbers_settings_and_pictures(store, tmp_path):
  config = {'optim': {'lr': 0.5}, 'seed': 3}
  with MetricWriter(tmp_path / 'run', tracked_by=('mlflow',), config=config) as writer:
    writer.write(10, {'train/loss': 0.25})
    writer.write(20, {'train/loss': float('nan'), 'eval/top1': 1})
    writer.write_image(20, 'pictures', np.zeros((4, 6, 3), np.uint8))
  client = MlflowClient()
  run = only_run(client)
  assert (run.info.run_name, run.info.status) == ('run', 'FINISHED')
  assert run.data.params == {'optim.lr': '0.5', 'seed': '3'}
  loss = history(client, 'train/loss')
  assert loss[10] == 0.25
  assert np.isnan(loss[20])
  assert history(client, 'eval/top1') == {20: 1}
  (picture,) = client.list_artifacts(run.info.run_id, 'pictures')
  assert picture.path == 'pictures/step_00000020.png'


def test_killed_and_started_again_it_is_one_run_everywhere(runs, store, tmp_path):
  workdir = tmp_path / 'run'
  environment = store | OFFLINE
  command = runs.command(workdir, trackers='wandb,mlflow')
  with runs.start(command, environment) as killed:
    killed.wait_until(lambda: last_step(workdir) > 16, 'the second checkpoint begun')
    killed.send(signal.SIGKILL)
    killed.wait()
  ended = runs.finish(command, environment)
  assert ended.returncode == 0, ended.stderr
  assert 'resuming at step' in ended.stderr
  assert 'tensorboard --logdir' not in ended.stderr
  assert not (workdir / 'tensorboard').exists()

  client = MlflowClient()
  assert only_run(client).info.status == 'FINISHED'
  ids = json.loads((workdir / 'trackers.json').read_text())
  assert only_run(client).info.run_id == ids['mlflow']
  rows = {row['step']: row['train/loss'] for row in metrics(workdir) if 'train/loss' in row}
  assert max(rows) == STEPS
  assert history(client, 'train/loss') == pytest.approx(rows, rel=1e-9)

  parts = [path.name for path in (workdir / 'wandb').glob('offline-run-*')]
  assert len(parts) == 2  # one a start; `wandb sync` joins those of one id
  assert {re.sub('offline-run-[0-9_]+-', '', part) for part in parts} == {ids['wandb']}


class Recorder:
  """A tracker of one's own."""

  def __init__(self, workdir, start_step, config):
    self.seen = [(workdir.name, start_step, config)]
    opened.append(self)

  def write(self, step, scalars):
    self.seen.append((step, dict(scalars)))

  def write_image(self, step, tag, image):
    self.seen.append((step, tag))

  def close(self, error):
    self.seen.append('closed')
    if error:
      raise ConnectionError('gone')


opened: list[Recorder] = []


def test_a_tracker_from_outside(tmp_path):
  name = f'{__name__}:Recorder'
  assert trackers.known((name, 'tensorboard'))
  with MetricWriter(tmp_path, start_step=4, tracked_by=(name,), config={'seed': 1}) as writer:
    writer.write(5, {'a': 1})
  assert opened.pop().seen == [(tmp_path.name, 4, {'seed': 1}), (5, {'a': 1}), 'closed']


def test_one_from_outside_that_fails_is_reported(tmp_path, caplog):
  name = f'{__name__}:Recorder'
  with pytest.raises(Stopped), MetricWriter(tmp_path, tracked_by=(name,)):
    raise Stopped
  assert opened.pop().seen[-1] == 'closed'
  (warning,) = caplog.messages
  assert warning.startswith(f'tracker {name}: gone; the run goes on')


@pytest.mark.parametrize(('error', 'status'), [(Stopped, 'KILLED'), (OSError, 'FAILED')])
def test_a_run_that_did_not_finish_is_shown_so(store, tmp_path, error, status):
  with pytest.raises(error), MetricWriter(tmp_path / 'run', tracked_by=('mlflow',)):
    raise error
  assert only_run(MlflowClient()).info.status == status


def test_a_run_that_is_gone_or_damaged_ids_get_one_line(store, tmp_path):
  with MetricWriter(tmp_path / 'run', tracked_by=('mlflow',)):
    pass
  client = MlflowClient()
  client.delete_run(only_run(client).info.run_id)
  ids = tmp_path / 'run' / 'trackers.json'
  with pytest.raises(UserError, match=rf'trackers=mlflow: .*, or delete {ids} to begin a new run'):
    MetricWriter(tmp_path / 'run', tracked_by=('mlflow',))
  for damaged in ('{"mlflow": "12', '[]'):
    ids.write_text(damaged)
    for name in ('mlflow', 'wandb'):
      with pytest.raises(UserError, match=rf'^{ids} is damaged: delete it to begin a new run'):
        MetricWriter(tmp_path / 'run', tracked_by=(name,))


def test_unknown_names_are_not_known():
  assert trackers.known(())
  assert trackers.known(('wandb,mlflow', 'tensorboard'))
  assert not trackers.known(('comet',))


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_an_absent_package_gets_one_line(name, tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, name, None)
  with pytest.raises(UserError, match=f'trackers={name} needs a package .*: pip install {name}'):
    MetricWriter(tmp_path, tracked_by=(name,))


def test_without_a_key_wandb_gets_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('WANDB_API_KEY', '')
  with pytest.raises(UserError, match=r'trackers=wandb: .*; log in with `wandb login`'):
    MetricWriter(tmp_path / 'run', tracked_by=('wandb',))


def test_a_store_that_cannot_be_used_gets_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://127.0.0.1:9')
  with pytest.raises(UserError, match=r'trackers=mlflow: .*MLFLOW_TRACKING_URI is http://127'):
    MetricWriter(tmp_path / 'run', tracked_by=('mlflow',))


def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(
  store, tmp_path, monkeypatch, caplog
):
  with MetricWriter(tmp_path / 'run', tracked_by=('mlflow',)) as writer:
    monkeypatch.setattr(MlflowClient, 'log_batch', _gone)
    writer.write(1, {'loss': 1.0})
    writer.write(2, {'loss': 2.0})
  assert [row['step'] for row in metrics(tmp_path / 'run')] == [1, 2]
  (warning,) = caplog.messages
  assert warning == (
    'tracker mlflow: server gone; the run goes on, and metrics.jsonl has everything'
  )


def _gone(*_, **__):
  raise ConnectionError('server gone\nmore')
