"""Real training runs, as processes, of a model so small that a step takes milliseconds."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from hivit_jax.interop import torch_names
from hivit_jax.train.checkpoint import load_params
from tests import patience

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 40
BEFORE_LAST = STEPS - 8  # the checkpoint
# Four steps are an epoch; checkpoints, log lines, evaluations and pictures have their own rhythms.
# A checkpoint takes more time than all the steps between two of them.
SETTINGS = {
  'max_steps': STEPS,
  'log_every_steps': 3,
  'checkpoint.every_epochs': 2.0,
  'knn.every_epochs': 2.5,
  'pictures.every_epochs': 4,
  'optim.lr': 1e-3,
  'optim.warmup_epochs': 1.0,
}
_PATIENCE = 300  # seconds on an idle machine
# How XLA compiles in half the time for CPUs: newer versions, such as 0.12, have no such choice.
QUICK = (
  '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  if jax.__version_info__ < (0, 11)
  else ''
)
# Of a process in which the compiler does all it can, unlike in the others.
OPTIMIZED = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '0', 'XLA_FLAGS': ''}
# No two runs agree in them.
TIMING = (
  *('train/images_per_second', 'train/data_wait_fraction'),
  *('train/host_memory_mb', 'train/device_memory_mb'),
)


class Runs:
  """Starts `python main.py`; what one process compiles the next one finds in a cache."""

  def __init__(self, directory: pathlib.Path, data_dir: pathlib.Path):
    self.environment = os.environ | {'TFDS_DATA_DIR': str(data_dir)}
    self.forks = Forks(self.environment, directory)

  def __enter__(self) -> 'Runs':
    return self

  def __exit__(self, *exc_info) -> None:
    self.forks.close()

  def command(self, workdir: os.PathLike, **settings) -> list[str]:
    """The command line of the tiny run; settings are keys of the config with __ for dots."""
    changed = SETTINGS | {key.replace('__', '.'): value for key, value in settings.items()}
    flags = [f'--config.{key}={value}' for key, value in changed.items()]
    command = [sys.executable, 'main.py', '--config=configs/demo.py:debug']
    return [*command, f'--workdir={workdir}', *flags]

  def finish(
    self, command: list[str], environment: Mapping[str, str] = MappingProxyType({})
  ) -> subprocess.CompletedProcess:
    """Runs a Python program to its end: `command` is as for `start`."""
    python, *program = command
    assert python == sys.executable
    ended = self.forks(*program, **environment)
    return subprocess.CompletedProcess(command, ended.status, ended.stdout, ended.stderr)

  def train(self, workdir: os.PathLike, **settings) -> subprocess.CompletedProcess:
    """Runs the tiny run to its end, whatever that is."""
    return self.finish(self.command(workdir, **settings))

  def start(
    self, command: list[str], environment: Mapping[str, str] = MappingProxyType({})
  ) -> 'Process':
    """Starts a Python program and leaves it running; for a `with` statement."""
    python, *program = command
    assert python == sys.executable
    return Process(self.forks, program, environment)

  @contextlib.contextmanager
  def job(
    self,
    *commands: list[str],
    found_by: str = 'environment',
    devices: int = 2,
  ) -> Iterator[list['Process']]:
    """Starts a command as the two processes of a job, or several as one process each.

    Only process 0 keeps what it compiles.
    """
    count = max(2, len(commands))
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    tell = {
      'flags': _by_flags, 'environment': _by_environment, 'slurm': _by_slurm, 'mpi': _by_mpi,
      'mpi5': _by_mpi5,
    }[found_by]  # fmt: skip
    with contextlib.ExitStack() as stack:
      processes = []
      for index in range(count):
        flags, environment = tell(port, index, count)
        environment |= on_devices(devices)
        process = self.start([*commands[index % len(commands)], *flags], environment)
        processes.append(stack.enter_context(process))
      yield processes


def on_devices(count: int) -> dict[str, str]:
  """Environment of a process with so many simulated devices."""
  return {'XLA_FLAGS': f'{QUICK} --xla_force_host_platform_device_count={count}'}


def _by_flags(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
  address = f'--coordinator_address=127.0.0.1:{port}'
  return [address, f'--num_processes={count}', f'--process_id={index}'], {}


def _by_environment(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
  return [], {
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': str(count),
    'JAX_PROCESS_ID': str(index),
  }


def _by_slurm(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
  """What srun tells its tasks; JAX takes the port from the job's number."""
  return [], {
    'SLURM_JOB_ID': str(port),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': str(count),
    'SLURM_PROCID': str(index),
    'SLURM_LOCALID': str(index),
  }


def _by_mpi(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
  """What mpirun of Open MPI 4 tells; JAX takes the port from the job's number, by 4096."""
  uri = {'OMPI_MCA_orte_hnp_uri': f'{port * 4096}.0;tcp://127.0.0.1:1'}
  return [], _by_mpi5(port, index, count)[1] | uri


def _by_mpi5(port: int, index: int, count: int) -> tuple[list[str], dict[str, str]]:
  return [f'--coordinator_address=127.0.0.1:{port}'], {
    'OMPI_COMM_WORLD_SIZE': str(count),
    'OMPI_COMM_WORLD_RANK': str(index),
    'OMPI_COMM_WORLD_LOCAL_RANK': str(index),
  }


class Forks:
  """Runs programs in forks of one process, `tests.forks`, that has the slow imports done."""

  def __init__(self, environment: Mapping[str, str], directory: pathlib.Path):
    self._files = [directory / name for name in ('stdout', 'stderr')]
    self._server = subprocess.Popen(
      [sys.executable, '-m', 'tests.forks'],
      cwd=ROOT,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def close(self) -> None:
    self._server.communicate()

  def __call__(self, *program: str, **environment: str) -> 'Ended':
    """Runs a Python file, named from the root of the repository, or `-m` a module, to its end."""
    for file in self._files:
      file.unlink(missing_ok=True)
    pid = self.start(program, environment, *self._files, seconds=int(patience.limit(_PATIENCE)))
    status = self.wait(pid, blocking=True)
    said = [file.read_text() for file in self._files]
    return Ended(status, said[1], said[0])

  def start(
    self,
    program: Sequence[str],
    environment: Mapping[str, str],
    stdout: pathlib.Path,
    stderr: pathlib.Path,
    seconds: int = 0,
  ) -> int:
    """Starts a program, as for a call, and returns the number of its process."""
    files = {'stdout': str(stdout), 'stderr': str(stderr)}
    job = {'program': program, 'environment': dict(environment), 'seconds': seconds}
    return self._ask(job | files)

  def wait(self, pid: int, blocking: bool = False) -> int | None:
    """Exit status of a process, once; minus the signal's number if a signal ended it."""
    return self._ask({'wait': pid, 'blocking': blocking})

  def _ask(self, question: dict) -> int | None:
    self._server.stdin.write(json.dumps(question) + '\n')
    self._server.stdin.flush()
    return json.loads(self._server.stdout.readline())


def on_eight_devices(forks: Forks, module: str, expression: str) -> Any:
  """What an expression, in which `here` is a module, gives as JSON on eight simulated devices."""
  # What it compiles is found the next time.
  code = (
    'import importlib, json, jax; jax.config.update("jax_platforms", "cpu"); '
    'from hivit_jax.runtime import compilation_cache; compilation_cache.turn_on(); '
    f'here = importlib.import_module({module!r}); print(json.dumps({expression}))'
  )
  ended = forks('-c', code, **on_devices(8))
  assert ended.status == 0, ended.stderr
  return json.loads(ended.stdout.splitlines()[-1])


class Process:
  """A running program. What it says goes to a file, so that it never waits for us."""

  def __init__(self, forks: Forks, program: Sequence[str], environment: Mapping[str, str]):
    self._log = tempfile.NamedTemporaryFile(prefix='run', suffix='.log')  # noqa: SIM115
    self._forks, self._status = forks, None
    log = pathlib.Path(self._log.name)
    self.pid = forks.start(program, environment, log, log)

  def __enter__(self) -> 'Process':
    return self

  def __exit__(self, *exc_info) -> None:
    self.send(signal.SIGKILL)
    patience.wait_until(self._ended, _PATIENCE)
    self._log.close()

  def output(self) -> str:
    return pathlib.Path(self._log.name).read_text()

  def wait_for(self, text: str) -> None:
    """Returns when the process has said `text`; fails if it ends before."""
    self.wait_until(lambda: text in self.output(), text)

  def wait_until(self, condition: Callable[[], bool], name: str) -> None:
    """Returns when the condition holds; fails if the process ends before."""

    def decided() -> bool:
      # The state first: what a process has done before it ended counts.
      ended = self._ended()
      return condition() or ended

    in_time = patience.wait_until(decided, _PATIENCE, interval=0.01)
    assert in_time, f'no "{name}" in time:\n{self.output()}'
    assert condition(), f'ended before "{name}":\n{self.output()}'

  def send(self, number: signal.Signals) -> None:
    """Sends a signal to the process, unless it has ended."""
    if not self._ended():
      os.kill(self.pid, number)

  def stop(self) -> None:
    """Stops all threads of the process where they are."""
    self.send(signal.SIGSTOP)
    self.wait_until(lambda: _states(self.pid) == {'T'}, 'SIGSTOP')

  def wait(self, seconds: float = _PATIENCE) -> int:
    """Exit status; minus the signal's number if a signal ended it.

    Args:
      seconds: that it may take on an idle machine.
    """
    assert patience.wait_until(self._ended, seconds), f'still running:\n{self.output()}'
    return self._status

  def _ended(self) -> bool:
    if self._status is None:
      self._status = self._forks.wait(self.pid)
    return self._status is not None


def _states(pid: int) -> set[str]:
  """Of the threads of a process, as /proc has them: T for stopped."""
  states = set()
  for file in pathlib.Path(f'/proc/{pid}/task').glob('*/stat'):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
      states.add(file.read_text().rpartition(')')[2].split()[0])
  return states


class Ended(NamedTuple):
  """What a program left behind that has ended."""

  status: int
  stderr: str
  stdout: str = ''


def error_of(ended: Ended) -> str:
  """The error of a program that ended with one line about a mistake."""
  assert ended.status == 2, ended.stderr
  assert ended.stderr.count('\n') == 1, ended.stderr
  assert ended.stderr.startswith('error: ')
  return ended.stderr.removeprefix('error: ').rstrip()


def metrics(workdir: pathlib.Path) -> list[dict]:
  """The rows of metrics.jsonl, without what depends on clock and machine."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def last_step(workdir: pathlib.Path) -> int:
  """The step of the newest complete row of metrics.jsonl of a run that may be going on; or -1."""
  try:
    return json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[-1])['step']
  except (FileNotFoundError, IndexError, ValueError):
    return -1


def assert_same_params(actual: pathlib.Path, expected: pathlib.Path, step: int = STEPS) -> None:
  """Compares the parameters of two runs' checkpoints bit for bit."""
  ours, theirs = (
    torch_names.flatten(load_params(workdir, step=step).state) for workdir in (actual, expected)
  )
  assert ours.keys() == theirs.keys()
  different = [
    '/'.join(map(str, path))
    for path, value in ours.items()
    if np.asarray(value).tobytes() != np.asarray(theirs[path]).tobytes()
  ]
  assert not different, f'{len(different)} of {len(ours)} parameters differ: {different[:5]}'


def content(directory: pathlib.Path) -> dict[str, bytes]:
  """Every file below a directory."""
  return {
    path.relative_to(directory).as_posix(): path.read_bytes()
    for path in sorted(directory.rglob('*'))
    if path.is_file()
  }


def warnings_of(log: str) -> list[str]:
  """The messages of log lines that are warnings or errors."""
  return re.findall(r'^\d\d:\d\d:\d\d [WEC] (.*)', log, re.MULTILINE)


def folder_of_images(root: pathlib.Path, count: int) -> dict[str, Any]:
  """Writes a data set of JPEG files in two classes; returns the settings of a run with it."""
  rng = np.random.default_rng(0)
  for split in ('train', 'val'):
    for i in range(count):
      path = root / split / 'ab'[i % 2] / f'{i}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
  return {
    'data__name': f'folder:{root}',
    'data__train_split': 'train',
    'data__eval_split': 'val',
    'knn__every_epochs': 0,
    'pictures__every_epochs': 0,
  }
