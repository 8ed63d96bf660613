"""Detection from the command line: it survives kills, and any devices train alike."""

import pytest

from tests import dense_runs
from tests.dense_runs import assert_same_after_kills, command_line, finished
from tests.runs import metrics

CONFIG = 'configs/detect_hivit_t.py:debug'
LONG = dense_runs.LONG | {'evaluation__every_epochs': 0}


def _command(workdir, *arguments: str, config: str = CONFIG, **settings) -> list[str]:
  return command_line(config, workdir, *arguments, **settings)


@pytest.fixture(scope='module')
def trained(runs, tmp_path_factory):
  """The workdir of a finished run."""
  workdir = tmp_path_factory.mktemp('detect') / 'run'
  return finished(runs, _command(workdir, **LONG), workdir)


def test_killed_in_a_save_and_in_a_step_it_ends_with_the_same_bits(runs, trained, tmp_path):
  workdir = tmp_path / 'run'
  assert_same_after_kills(runs, _command(workdir, **LONG), workdir, trained)


def test_two_processes_of_four_devices_train_as_one(runs, trained, tmp_path):
  """In the first step, gradient included: later, rounding decides about boxes."""
  workdir = tmp_path / 'run'
  with runs.job(_command(workdir, **LONG | {'max_steps': 1}, mesh__fsdp=2), devices=4) as job:
    assert [process.wait() for process in job] == [0, 0], [process.output() for process in job]
    assert 'float32 on 8 x cpu' in job[0].output()
  ours, expected = ([row for row in metrics(w) if row['step'] == 1] for w in (workdir, trained))
  keys = [key for key in expected[0] if key.startswith('train/')]
  assert 'train/grad_norm' in keys
  assert [ours[0][k] for k in keys] == pytest.approx([expected[0][k] for k in keys], rel=1e-4)
