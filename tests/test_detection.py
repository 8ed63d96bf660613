"""Detection from the command line: it survives kills, and any devices train alike."""

import random
import signal
import sys

import jax
import numpy as np
import pytest

from hivit_jax.train.checkpoint import load_params
from tests.runs import last_step, metrics
from tests.test_runs import stop_while

CONFIG = 'configs/detect_hivit_t.py:debug'
STEPS = 16
LONG = {
  'max_steps': STEPS,
  'epochs': STEPS / 2,
  'ema_decay': 0.5,
  'checkpoint__every_epochs': 1.0,
  'evaluation__every_epochs': 0,
}


def _command(workdir, *arguments: str, config: str = CONFIG, **settings) -> list[str]:
  flags = [f'--config.{key.replace("__", ".")}={value}' for key, value in settings.items()]
  return [
    sys.executable, 'main.py', f'--config={config}', f'--workdir={workdir}', *arguments, *flags
  ]  # fmt: skip


@pytest.fixture(scope='module')
def trained(runs, tmp_path_factory):
  """The workdir of a finished run."""
  workdir = tmp_path_factory.mktemp('detect') / 'run'
  done = runs.finish(_command(workdir, **LONG))
  assert done.returncode == 0, done.stderr
  return workdir


def test_killed_in_a_save_and_in_a_step_it_ends_with_the_same_bits(runs, trained, tmp_path):
  workdir = tmp_path / 'run'
  command = _command(workdir, **LONG)
  saving = lambda: any((workdir / 'checkpoints').glob('*.writing*'))  # noqa: E731
  for step in (0, 5):  # the first kill is in the save of step 2, the second behind it
    with runs.start(command) as process:
      process.wait_until(lambda: last_step(workdir) >= step, f'step {step}')  # noqa: B023
      if not step:
        stop_while(process, saving, random.Random())
      process.send(signal.SIGKILL)
      assert process.wait() == -signal.SIGKILL
  done = runs.finish(command)
  assert done.returncode == 0, done.stderr
  assert 'resuming at step' in done.stderr
  assert metrics(workdir) == metrics(trained)
  for key in ('params', 'ema', 'opt_state'):
    one, two = (load_params(w, key=key).state for w in (workdir, trained))
    jax.tree.map(np.testing.assert_array_equal, one, two)


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
