"""Real training runs, as processes, of a model so small that a step takes milliseconds."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from hivit_jax.interop import torch_names
from hivit_jax.train.checkpoint import load_params

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12
# Four steps are an epoch; checkpoints, log lines and evaluations fall on different steps.
SETTINGS = {
  'max_steps': STEPS,
  'log_every_steps': 3,
  'checkpoint.every_epochs': 0.5,
  'knn.every_epochs': 1.0,
  'pictures.every_epochs': 1.5,
  'optim.lr': 1e-3,
  'optim.warmup_epochs': 1.0,
}
# Of the wall clock: no two runs agree in them.
TIMING = ('train/images_per_second', 'train/data_wait_fraction')


def command(workdir: os.PathLike, **settings) -> list[str]:
  """`python main.py ...` of the tiny run; settings are keys of its config with __ for dots."""
  changed = SETTINGS | {key.replace('__', '.'): value for key, value in settings.items()}
  flags = [f'--config.{key}={value}' for key, value in changed.items() if value is not None]
  return [sys.executable, 'main.py', '--config=configs/demo.py:debug', f'--workdir={workdir}', *flags]


def train(workdir: os.PathLike, **settings) -> subprocess.CompletedProcess:
  """Runs it to its end, whatever that is."""
  return finish(command(workdir, **settings))


def finish(arguments: list[str], **options) -> subprocess.CompletedProcess:
  options = {'cwd': ROOT, 'capture_output': True, 'text': True, 'timeout': 120} | options
  return subprocess.run(arguments, **options)


class Process:
  """A run that is still going on; what it says is in the file `log`."""

  def __init__(self, arguments: list[str], log: pathlib.Path, **options):
    self.log = log
    with open(log, 'w') as file:
      self._process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, **options
      )

  def __enter__(self) -> 'Process':
    return self

  def __exit__(self, *exc_info) -> None:
    self._process.kill()
    self._process.wait()

  def output(self) -> str:
    return self.log.read_text()

  def wait_for(self, text: str, seconds: float = 60) -> None:
    """Returns when the run has said `text`; fails if it ends before or does not."""
    self.wait_until(lambda: text in self.output(), seconds, text)

  def wait_until(self, condition, seconds: float = 60, what: str = 'condition') -> None:
    deadline = time.monotonic() + seconds
    while not condition():
      assert self._process.poll() is None, f'ended before {what}:\n{self.output()}'
      assert time.monotonic() < deadline, f'no {what}:\n{self.output()}'
      time.sleep(0.002)

  def send(self, number: signal.Signals) -> None:
    self._process.send_signal(number)

  def wait(self, seconds: float = 60) -> int:
    return self._process.wait(timeout=seconds)


def metrics(workdir: pathlib.Path) -> list[dict]:
  """The rows of metrics.jsonl, without what depends on the clock."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def params(workdir: pathlib.Path, step: int = STEPS) -> dict[str, np.ndarray]:
  """The parameters of a checkpoint by name."""
  return {
    '/'.join(map(str, path)): np.asarray(value)
    for path, value in torch_names.flatten(load_params(workdir, step=step).state).items()
  }


def assert_same_params(actual: pathlib.Path, expected: pathlib.Path, step: int = STEPS) -> None:
  """Bit for bit."""
  ours, theirs = params(actual, step), params(expected, step)
  assert ours.keys() == theirs.keys()
  different = [name for name, value in ours.items() if value.tobytes() != theirs[name].tobytes()]
  assert not different, f'{len(different)} of {len(ours)} parameters differ: {different[:5]}'


def content(directory: pathlib.Path) -> dict[str, bytes]:
  """Every file below a directory."""
  return {
    path.relative_to(directory).as_posix(): path.read_bytes()
    for path in directory.rglob('*')
    if path.is_file()
  }
