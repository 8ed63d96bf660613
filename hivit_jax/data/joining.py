"""From the chunks of a batch to the batch."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from hivit_jax.data.stream import Chunks, Form, Stacked, check_alike, form

_GRACE = 1  # Seconds for a thread to end by itself.


class Joining(Iterator[dict[str, Any]]):
  """Copies each chunk to its place in a new batch, as it comes.

  Every batch has memory of its own and is the receiver's to keep: JAX may use it where it lies,
  without a copy. Chunks of worker processes lie in shared memory, which copying frees.

  Only the last chunk of a batch comes out with rows: those of the whole batch. A chunk that does
  not fit the first one of its batch becomes {'error': UserError}.
  """

  def __init__(self, loaded: grain.DatasetIterator, chunks: Chunks):
    """Takes from `loaded` what `chunks` load, in their order, from the first one of a batch on."""
    self._loaded = loaded
    self._chunks = chunks
    self._next = 0  # Chunk of the batch.
    self._filled = 0  # Rows of the batch.
    self._first: tuple[int, Form] = 0, {}  # Index of an example, and its form.
    self._batch: Stacked = {}

  def __next__(self) -> dict[str, Any]:
    chunk = next(self._loaded)
    if 'error' in chunk:
      return chunk
    rows = chunk['rows']
    own = chunk['like'], form({key: values[0] for key, values in rows.items()})
    if self._next == 0:
      self._filled, self._first, self._batch = 0, own, self._empty(rows)
    try:
      check_alike(self._chunks.source, self._first, own, ragged=self._chunks.ragged)
    except Exception as error:
      return {'error': error}
    count = 0
    for key, values in rows.items():
      count, joined = len(values), self._batch[key]
      if isinstance(joined, list):
        joined += map(np.array, values)
      else:
        joined[self._filled : self._filled + count] = values
    self._filled += count
    self._next = (self._next + 1) % self._chunks.rows.chunks
    done = {key: chunk[key] for key in ('broken', 'seen')}
    if self._next:
      return done
    batch, self._batch = self._batch, {}
    return done | {'rows': batch}

  def _empty(self, rows: Stacked) -> Stacked:
    count = self._chunks.rows.count
    return {
      key: [] if isinstance(values, list) else np.empty((count, *values.shape[1:]), values.dtype)
      for key, values in rows.items()
    }

  def close(self) -> None:
    """Ends the loading."""
    self._loaded.close()


class Ahead(Iterator[dict[str, Any]]):
  """What a `Joining` gives, taken from it by a thread of its own.

  Not Grain's thread: that asks for a state with every chunk, which is expensive with worker
  processes, and closing it waits for data even if they never come.
  """

  def __init__(self, joining: Joining, size: int):
    """Begins to take up to `size` chunks ahead."""
    self._joining = joining
    self._ready: queue.Queue[Any] = queue.Queue(size)
    self._stop = threading.Event()
    arguments = joining, self._ready, self._stop
    self._thread = threading.Thread(target=_take, args=arguments, daemon=True, name='joining')
    self._thread.start()

  def __next__(self) -> dict[str, Any]:
    taken = self._ready.get()
    if isinstance(taken, BaseException):
      raise taken
    return taken

  def close(self) -> None:
    """Ends the thread, or leaves it behind if it waits for data, and the loading."""
    self._stop.set()
    with contextlib.suppress(queue.Empty):
      while True:  # It may wait for room.
        self._ready.get_nowait()
    self._thread.join(timeout=_GRACE)
    self._joining.close()


def _take(joining: Joining, ready: queue.Queue[Any], stop: threading.Event) -> None:
  try:
    while not stop.is_set():
      ready.put(next(joining))
  except BaseException as error:
    ready.put(error)
