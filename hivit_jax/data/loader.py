"""From a source of examples to batches of arrays: threads, worker processes, broken files.

Hosts, threads, worker processes and restarts do not change what the model sees: the example at a
position of the stream is a function of (seed, position); see `stream`. Any step can be loaded
without the steps before it, so a checkpoint needs no input state: the step number is the state.

Grain runs the threads and worker processes, over chunks of a host's batch.
"""

import logging
import math
import multiprocessing
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from hivit_jax.data.cores import crew, usable_cores
from hivit_jax.data.joining import Ahead, Joining
from hivit_jax.data.order import InOrder, Order, Pass, Shuffled
from hivit_jax.data.sources.base import Source
from hivit_jax.data.stream import (
  Broken,
  Chunks,
  EvalChunks,
  Rows,
  TrainChunks,
  example_name,
  listed,
)
from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)

Batch = dict[str, Any]  # `Stacked`, of which callers know what is a list.

PREFETCH = 2  # Batches that are ready before they are asked for.
TRUSTED_SAMPLE = 1000  # Examples to be seen before a share of broken ones is taken at face value.
ENDLESS = 2**38  # Steps; positions stay below 2**62.


def train_loader(
  source: Source,
  transform: Callable[..., Mapping[str, np.ndarray]],
  *,
  batch_size: int,
  seed: int,
  order: Order | None = None,
  start_step: int = 0,
  num_steps: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  **loading: Any,
) -> 'Loader':
  """Returns this host's batches of the training stream, beginning with `start_step`.

  A batch has the keys that the transform returns, such as {'image': uint8 (b, H, W, C), 'label':
  int32 (b,)}, each array stacked over b = batch_size / process_count examples. The hosts' batches
  one after the other are the batch that a single host would get. A broken example is replaced by
  another, which the order chooses.

  Args:
    source: Where the examples come from.
    transform: `transform(example, rng)` returns a dict of arrays, of the same shapes and types for
      every example of a step. It is also given by name what `order.given` tells, such as a shape.
      Raises `decode.BrokenImage` for an example that is broken.
    batch_size: Examples in a step, over all hosts.
    seed: Fixes augmentation and, without `order`, the order; 0 <= seed < 2**63.
    order: Which examples, and what the transform is given; None: `order.Shuffled`.
    start_step: First step to deliver. A later one costs no more than 0.
    num_steps: Number of steps to deliver; None for no end.
    process_index: This host, from 0.
    process_count: Number of hosts.
    **loading: Threads, worker processes and so on; see `Loader`.

  Raises:
    UserError: The batch size does not divide among the hosts, the source is empty, or a number is
      out of its range.
  """
  _check_range('seed', seed, 0, 2**63 - 1)
  _check_range('start_step', start_step, 0, ENDLESS)
  stop_step = ENDLESS if num_steps is None else start_step + num_steps
  _check_range('num_steps', stop_step - start_step, 0, ENDLESS)
  rows = _rows_of_host(batch_size, process_index, process_count)
  if order is None:
    order = Shuffled(len(source), seed)
  chunks = TrainChunks(source, transform, rows, seed, order)
  return Loader(chunks, range(start_step, stop_step), **loading)


def eval_loader(
  source: Source,
  transform: Callable[[dict[str, Any]], Mapping[str, np.ndarray]],
  *,
  batch_size: int,
  order: Pass | None = None,
  process_index: int = 0,
  process_count: int = 1,
  **loading: Any,
) -> 'Loader':
  """Returns this host's batches of one pass over the source, each example once.

  A batch has the keys that the transform returns, each array stacked over b = batch_size /
  process_count examples, and 'mask': bool (b,), 'index': int32 (b,), positions in the source. All
  hosts get batches of the same number and shapes: where the mask is False there is no example to
  count, either because the row is padding (index -1) or because the example is broken (see
  `Loader.broken`); all else is 0 there, of the shape of a real row.

  The transform is called as `transform(example)`, and given by name what `order.given` tells; the
  order without one is that of the source. If it has an attribute `ragged` that is True, shapes may
  differ: then every key is a list of b arrays, except where a transform returns scalars.

  Other args and raises: as for `train_loader`.
  """
  rows = _rows_of_host(batch_size, process_index, process_count)
  order = InOrder(len(source), batch_size) if order is None else order
  chunks = EvalChunks(source, transform, rows, order)
  return Loader(chunks, range(order.steps), **loading)


class Loader(Iterator[Batch]):
  """An iterator over batches that loads ahead and keeps track of broken examples.

  Close it, or use it in a `with`, to stop its threads and processes; it closes itself at its end
  and when it raises an error. Threads and worker processes begin to load at once.

  An example is broken if it cannot be read (OSError: a file that has disappeared, too) or decoded
  (`BrokenImage`). Each is logged once by name, unless it is in `told` already. The iterator raises
  `UserError` with a list when the different broken examples are more than `max_broken_fraction` of
  those seen on this host. So that bad luck at the beginning stops nothing, the share counts from
  the first 1000 examples (or the whole source, if smaller) on, and a single broken one is tolerated
  unless the fraction is 0.

  Attributes:
    broken: Index in the source -> name and reason, for every broken example met so far.
  """

  def __init__(
    self,
    chunks: Chunks,
    steps: range,
    *,
    num_threads: int | None = None,
    num_workers: int = 0,
    prefetch: int = PREFETCH,
    max_broken_fraction: float = 0.01,
    told: set[str] | None = None,
  ):
    """Begins to load.

    Args:
      chunks: What to load, see `train_loader` and `eval_loader`.
      steps: Of which batches.
      num_threads: Threads in each process that loads; 0 loads in the calling thread when asked.
        None gives one for each usable core, shared out among the workers, see `cores.crew`.
      num_workers: Worker processes. With 0 the threads work in this process, which suffices as
        long as the training step does not wait for data: decoding and resizing release the
        interpreter lock. Workers take seconds to start and 200 MB or more each. They import the
        main module anew, so a script that uses them needs its `if __name__ == '__main__':`.
      prefetch: Batches to have ready.
      max_broken_fraction: Share of broken examples that is tolerated.
      told: Broken examples that are not logged again; what is logged is added: for repeated passes.
    """
    if num_threads is None:
      num_threads = crew(usable_cores(), 1, workers=num_workers).threads
    _check_range('num_threads', num_threads, 0, 1024)
    _check_range('num_workers', num_workers, 0, 1024)
    _check_range('prefetch', prefetch, 0, 1024)
    _check_range('max_broken_fraction', max_broken_fraction, 0, 1)
    self.broken: dict[int, str] = {}
    self._told = set() if told is None else told
    self._seen = 0
    self._chunks = chunks
    self._max_broken_fraction = max_broken_fraction
    per_step = chunks.rows.chunks
    self._steps_left = len(steps)
    ahead = max(0, prefetch - 1) * per_step  # One more batch is joined already.
    # Worker processes get no end: `__next__` counts, and Grain leaks shared memory at the end.
    stop = ENDLESS if num_workers else steps.stop
    dataset = grain.MapDataset.range(steps.start * per_step, stop * per_step).map(chunks)
    if num_workers:
      if not flags.FLAGS.is_parsed():  # Grain reads its own; a script without flags has defaults.
        flags.FLAGS.mark_as_parsed()
      # The queues of the workers hold what is loaded ahead; the buffer only feeds the threads.
      dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads, num_threads))
      options = grain.MultiprocessingOptions(num_workers, max(1, math.ceil(ahead / num_workers)))
      dataset = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
    else:
      buffer = max(num_threads, ahead) if num_threads else 0
      dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads, buffer))
    loaded = iter(dataset)
    joining = Joining(loaded, chunks)
    # In a list that closing empties: Grain's iterators must not live to see Python's shutdown.
    self._running: list[Joining | Ahead] = [joining]
    if self._steps_left and num_threads and prefetch:
      # The next batch is joined while the last one is used.
      self._running = [Ahead(joining, per_step)]
    elif self._steps_left:
      loaded.start_prefetch()
    self._finalizer = weakref.finalize(self, _close, self._running)

  def __next__(self) -> Batch:
    if not self._steps_left:
      self.close()
    if not self._running:
      raise StopIteration
    self._steps_left -= 1
    part: dict[str, Any] = {}
    try:
      for _ in range(self._chunks.rows.chunks):
        part = next(self._running[0])
        if 'error' in part:
          raise part['error']
        self._account(part['broken'], part['seen'])
      return part['rows']
    except BaseException as error:
      self.close()
      ended = re.match(r'Worker process was terminated .*?exit code (-?\d+)', str(error))
      if ended and ended[1].startswith('-'):
        raise UserError(
          f'A data worker process was killed (exit code {ended[1]}; -9: the kernel was short of '
          'memory, use fewer --config.data.num_workers). The same command continues.'
        ) from error
      if ended:
        raise UserError(
          f'A data worker process ended (exit code {ended[1]}; the reason is above). A script that '
          "trains with worker processes needs its `if __name__ == '__main__':`; "
          '--config.data.num_workers=0 does without.'
        ) from error
      raise

  def close(self) -> None:
    """Stops threads and worker processes; afterwards the iterator is at its end."""
    self._finalizer()

  def __enter__(self) -> 'Loader':
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _account(self, broken: Broken, seen: int) -> None:
    source = self._chunks.source
    for index, reason in broken:
      if index not in self.broken:
        self.broken[index] = f'{example_name(source, index)} ({reason})'
        if self.broken[index] not in self._told:
          self._told.add(self.broken[index])
          _log.warning('Broken example, %s: %s', self._chunks.remedy, self.broken[index])
    self._seen += seen
    # Beyond an epoch only examples that are known already come along.
    different = min(self._seen, len(source))
    sample = max(different, min(TRUSTED_SAMPLE, len(source)))
    allowed = self._max_broken_fraction * sample
    if self._max_broken_fraction > 0:
      allowed = max(allowed, 1)
    if len(self.broken) > allowed:
      raise UserError(
        f'{len(self.broken)} of the {different} examples of {source.name} ({source.split}) seen so '
        f'far are broken, more than max_broken_fraction={self._max_broken_fraction:g} allows. '
        'Repair or remove them, or allow more (--config.data.max_broken_fraction='
        f'{min(1, 2 * len(self.broken) / sample):.2g}): {listed(list(self.broken.values()))}'
      )


def _rows_of_host(batch_size: int, process_index: int, process_count: int) -> Rows:
  _check_range('batch_size', batch_size, 1, 2**24)
  _check_range('process_count', process_count, 1, 2**31)
  _check_range('process_index', process_index, 0, process_count - 1)
  count, rest = divmod(batch_size, process_count)
  if rest:
    fitting = [size for size in (batch_size - rest, batch_size - rest + process_count) if size]
    raise UserError(
      f'batch_size={batch_size} does not divide among {process_count} hosts; '
      f'take {" or ".join(map(str, fitting))}.'
    )
  return Rows(batch_size, process_index * count, count)


def _close(running: list[Joining | Ahead]) -> None:
  running.pop().close()


def _check_range(name: str, value: float, low: float, high: float) -> None:
  if not low <= value <= high:
    raise UserError(f'{name}={value!r}: expected {low} to {high}.')


def _init_worker(worker_index: int, worker_count: int) -> None:
  """Ties a worker process to its parent: ends with it, and only with it."""
  del worker_index, worker_count
  # Ctrl-C and a scheduler's SIGTERM go to the whole process group. The parent needs its workers
  # until it has saved its state, and then stops them itself.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  # A parent that was killed cannot stop them.
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
  os._exit(1)
