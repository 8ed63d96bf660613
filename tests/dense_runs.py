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


def assert_same_after_kills(
  runs: Runs, command: list[str], workdir: Path, expected: Path, *, again: bool = True
) -> None:
  """A run killed in its first save and `again` in a step, or in a later save, ends like `expected`.

  Without `again` one process fewer is started.
  """

  def saving() -> bool:
    names = [path.name for path in (workdir / 'checkpoints').glob('*')]
    complete = any(name.isdigit() for name in names)
    return any('.writing' in name for name in names) and (again or complete)

  with runs.start(command) as process:
    process.wait_until(lambda: last_step(workdir) >= 0, 'step 0')
    stop_while(process, saving, random.Random())
    _kill(process)
  if again:
    with runs.start(command) as process:
      process.wait_until(lambda: last_step(workdir) >= 9, 'step 9')  # saved at 4 and 8
      _kill(process)
  done = runs.finish(command)
  assert done.returncode == 0, done.stderr
  assert 'resuming at step' in done.stderr
  assert metrics(workdir) == metrics(expected)
  for key in ('params', 'ema', 'opt_state'):
    one, two = (load_params(directory, key=key).state for directory in (workdir, expected))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def _kill(process: Any) -> None:
  process.send(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
