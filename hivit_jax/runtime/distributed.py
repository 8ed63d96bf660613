"""Several processes as one job: how they find each other, and what they agree on.

Every process runs the same program on its own devices and its own part of every batch. Process 0,
the primary, alone writes logs, metrics and pictures; checkpoints are written by all of them.
"""

import collections
import contextlib
import glob
import json
import os
import pathlib
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hivit_jax.errors import UserError

_VOTE_DELAY = 2  # steps
coordinator_host: str | None = None  # of process 0, where the user told it


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the other processes of the job, if there are any; before JAX looks for devices.

  JAX finds them on Cloud TPUs, under Slurm and under Open MPI 4. Elsewhere the user names them,
  by the arguments or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Open MPI 5
  tells all but the first.

  Args:
    coordinator_address: host:port of process 0; any free port.
    num_processes: of the whole job; 1: do not look for others.
    process_id: of this one, from 0.

  Raises:
    UserError: only some of them were given, or the others do not answer.
  """
  names = ('coordinator_address', 'num_processes', 'process_id')
  given: dict[str, Any] = dict(
    zip(names, (coordinator_address, num_processes, process_id), strict=True)
  )
  for name in names:
    if given[name] is None and (text := os.environ.get(f'JAX_{name.upper()}')):
      given[name] = text if name == 'coordinator_address' else _number(name, text)
  mpi = os.environ.get('OMPI_COMM_WORLD_SIZE', '1')
  if given['coordinator_address'] and mpi != '1':
    given['num_processes'] = given['num_processes'] or int(mpi)
    if given['process_id'] is None:
      given['process_id'] = int(os.environ['OMPI_COMM_WORLD_RANK'])
  if given['num_processes'] == 1:
    return
  if given['coordinator_address']:
    global coordinator_host
    coordinator_host = given['coordinator_address'].rpartition(':')[0].strip('[]')
  told = [name for name, value in given.items() if value is not None]
  # A signal stops the job after a step that all processes agree on, see `Votes`.
  jax.config.update('jax_enable_preemption_service', False)
  options = {}
  if given['coordinator_address'] and mpi != '1' and 'OMPI_MCA_orte_hnp_uri' not in os.environ:
    # Open MPI 5: all is known, but from 0.12 on JAX would still ask mpi4py.
    options['cluster_detection_method'] = 'deactivate'
  try:
    jax.distributed.initialize(**given, local_device_ids=local_devices(), **options)
  except ValueError as error:
    if told:
      raise UserError(
        f'{", ".join(f"--{name}={given[name]}" for name in told)}: {error} All of '
        f'{", ".join(f"--{name}" for name in names)} are needed without a Slurm, Open MPI or TPU '
        'environment'
      ) from error
    if mpi != '1':
      raise _no_coordinator(mpi) from error
  except RuntimeError as error:  # JAX's own errors are such, too
    if not given['coordinator_address']:
      if mpi != '1':
        raise _no_coordinator(mpi) from error
      raise UserError(
        f'cannot find the other processes of this job: {first_line(error)}; give '
        f'{", ".join(f"--{name}" for name in names)}, or --num_processes=1 if there are none'
      ) from error
    raise UserError(
      f'no contact with all of the {given["num_processes"] or "other"} processes: '
      f'{first_line(error)}; is --coordinator_address={given["coordinator_address"]} the host of '
      'process 0, its port free and open, and was every process started?'
    ) from error


def _no_coordinator(processes: str) -> UserError:
  return UserError(
    f'Open MPI has started {processes} processes, but does not say where process 0 is: give '
    '--coordinator_address=HOST:PORT (its host, any free port), or pip install mpi4py'
  )


def _number(name: str, text: str) -> int:
  if not text.isdecimal():
    raise UserError(f'JAX_{name.upper()}={text}: expected a number')
  return int(text)


def local_devices() -> list[int] | None:
  """The GPUs of this process where JAX, which takes the task's number on its node, would be wrong.

  Under Slurm: all of them for the only task on a node, and the one that was given to a task alone.
  """
  tasks = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '')
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  names = visible.split(',') if visible is not None else glob.glob('/dev/nvidia[0-9]*')
  names = [name for name in names if name]
  if tasks and (len(names) == 1 or (names and re.fullmatch(r'1(\(x\d+\))?', tasks))):
    return list(range(len(names)))
  return None


def primary() -> bool:
  """Whether this is process 0."""
  return jax.process_index() == 0


def on_primary(function: Callable[[], Any]) -> Any:
  """Calls a function in process 0 and returns its result in all of them.

  Args:
    function: returns what JSON can hold.

  Raises:
    UserError: if the function did so, in all processes.
  """
  if jax.process_count() == 1:
    return function()
  answer: dict[str, Any] = {}
  unexpected = None
  if primary():
    try:
      answer = {'result': function()}
    except UserError as error:
      answer = {'mistake': str(error)}
    except BaseException as error:
      unexpected, answer = error, {'mistake': f'process 0 failed: {error!r}'}
  answer = json.loads(_broadcast(json.dumps(answer).encode()))
  if unexpected is not None:
    raise unexpected
  if 'mistake' in answer:
    raise UserError(answer['mistake'])
  return answer['result']


def _broadcast(message: bytes) -> bytes:
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
  padded = np.zeros(length, np.uint8)
  if primary():
    padded[:] = np.frombuffer(message, np.uint8)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
  """Process 0 runs the block before the others do, also if it fails in it: to prepare data."""
  if jax.process_count() == 1:
    yield
    return
  if not primary():
    multihost_utils.sync_global_devices('primary_first')
  try:
    yield
  finally:
    if primary():
      multihost_utils.sync_global_devices('primary_first')


def meet() -> None:
  """Returns when all processes have called it."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('meet')


def check_shared(directory: pathlib.Path) -> None:
  """UserError, in all processes, unless they all see the same directory."""
  if jax.process_count() == 1:
    return

  def mark() -> str:
    path = directory / f'.shared-{secrets.token_hex(8)}'
    path.touch()
    return path.name

  name = on_primary(mark)
  sees = multihost_utils.process_allgather(np.asarray((directory / name).exists()))
  if primary():
    (directory / name).unlink()
  if not sees.all():
    blind = ', '.join(str(index) for index in np.flatnonzero(~sees))
    raise UserError(
      f'--workdir={directory} is not the same directory for process {blind} as for process 0; '
      'a run of several processes needs one that all see, on a shared file system'
    )


class Votes:
  """Whether any process wants to stop; all learn it at the same step.

  With several processes the answer is two steps old, so that no process waits for the devices.
  """

  def __init__(self, mesh: Mesh):
    self._alone = jax.process_count() == 1
    if self._alone:
      return
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._shape = (mesh.size,)
    self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._asked: collections.deque[jax.Array] = collections.deque()

  def __call__(self, wish: bool) -> bool:
    """To be called once a step by every process."""
    if self._alone:
      return wish
    own = np.full(len(self._sharding.addressable_devices), wish)
    wishes = jax.make_array_from_process_local_data(self._sharding, own, self._shape)
    self._asked.append(self._any(wishes))
    return len(self._asked) > _VOTE_DELAY and bool(self._asked.popleft())


def first_line(error: Exception) -> str:
  """What an error of JAX's says, shortened."""
  return str(error).strip().split('\n')[0][:200]
