"""Checks shared by the runs of dense tasks: real processes of `:debug` configs, killed."""

import random
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hivit_jax.train.checkpoint import load_params
from tests.runs import Runs, last_step, metrics
from tests.test_runs import stop_while

STEPS = 16
LONG = {'max_steps': STEPS, 'epochs': STEPS / 2, 'ema_decay': 0.5, 'checkpoint__every_epochs': 2.0}


def command_line(config: str, workdir: Path, *arguments: str, **settings: Any) -> list[str]:
  """`python main.py`; settings are keys of the config with __ for dots."""
  flags = [f'--config.{key.replace("__", ".")}={value}' for key, value in settings.items()]
  start = [sys.executable, 'main.py', f'--config={config}', f'--workdir={workdir}']
  return [*start, *arguments, *flags]


def finished(runs: Runs, command: list[str], workdir: Path) -> Path:
  """The workdir of a run, after it has ended."""
  done = runs.finish(command)
  assert done.returncode == 0, done.stderr
  return workdir


def assert_same_after_a_kill(runs: Runs, command: list[str], workdir: Path, expected: Path) -> None:
  """A run killed while it saves its second checkpoint, or a later one, ends like `expected`."""

  def saving() -> bool:
    names = [path.name for path in (workdir / 'checkpoints').glob('*')]
    return any('.writing' in name for name in names) and any(name.isdigit() for name in names)

  with runs.start(command) as process:
    process.wait_until(lambda: last_step(workdir) >= 0, 'step 0')
    stop_while(process, saving, random.Random())
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  done = runs.finish(command)
  assert done.returncode == 0, done.stderr
  assert 'resuming at step' in done.stderr
  assert metrics(workdir) == metrics(expected)
  for key in ('params', 'ema', 'opt_state'):
    one, two = (load_params(directory, key=key).state for directory in (workdir, expected))
    jax.tree.map(np.testing.assert_array_equal, one, two)
