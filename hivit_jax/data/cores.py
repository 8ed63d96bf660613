"""How many threads and processes load data."""

import os
from typing import NamedTuple

MAX_THREADS = 16  # Of a process; more of them would mostly wait for the interpreter lock.
WORKER_CORES = 8  # That a worker process gets, where there are several.
DEVICE_CORES = 16  # That decode for one device: some 7000 crops of 500x375 JPEGs a second.


class Crew(NamedTuple):
  """Who loads the data of one process.

  Attributes:
    threads: In each process that loads.
    workers: Worker processes; 0: the threads work in this process.
  """

  threads: int
  workers: int

  @property
  def cores(self) -> int:
    """Cores that it can keep busy."""
    return self.threads * max(1, self.workers)

  def __str__(self) -> str:
    threads = f'{self.threads} thread{"s" * (self.threads != 1)}'
    if not self.workers:
      return threads
    return f'{self.workers} process{"es" * (self.workers != 1)} of {threads}'


def crew(cores: int, devices: int, threads: int | None = None, workers: int | None = None) -> Crew:
  """Returns who loads the data on a machine.

  Threads of this process suffice for up to `MAX_THREADS` cores. Worker processes take over where
  there are more, and devices to use them: each device is fed by `DEVICE_CORES` at most, since a
  worker takes memory and seconds to start.

  Args:
    cores: That the process may use.
    devices: Of the process.
    threads: In each process that loads; None: chosen.
    workers: Worker processes; None: chosen, and none if `threads` is given.
  """
  if workers is None and threads is None:
    cores = min(cores, devices * DEVICE_CORES)
  if workers is None:
    workers = 0 if threads else _workers(cores)
  if threads is None:
    threads = max(1, min(MAX_THREADS, cores // max(1, workers)))
  return Crew(threads, workers)


def more_workers(cores: int, workers: int) -> int:
  """Returns a number of worker processes that keeps more cores busy than `workers` do."""
  return max(workers + 1, _workers(cores))


def usable_cores() -> int:
  """Returns the number of CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _workers(cores: int) -> int:
  return 0 if cores <= MAX_THREADS else cores // WORKER_CORES
