"""From the chunks of a batch to the batch."""

from typing import Any

import numpy as np

from hivit_jax.data.stream import Chunks, Stacked, check_alike, form


class Joining:
  """Copies each chunk to its place in a new batch, as it comes.

  Every batch has memory of its own and is the receiver's to keep: JAX may use it as it is, without
  a copy. Chunks of worker processes lie in shared memory, which copying frees.

  Called with the chunks of `Chunks` in their order, by one thread. Returns each without its rows,
  but the last one of a batch with those of the batch. A chunk that does not fit the first one of
  its batch becomes {'error': UserError}.
  """

  def __init__(self, chunks: Chunks):
    self._chunks = chunks
    self._next = 0  # Chunk of the batch.
    self._filled = 0  # Rows of the batch.
    self._first: dict[str, Any] = {}
    self._batch: Stacked = {}

  def __call__(self, chunk: dict[str, Any]) -> dict[str, Any]:
    if 'error' in chunk:
      return chunk
    rows = chunk['rows']
    own = {'like': chunk['like'], 'form': form({key: values[0] for key, values in rows.items()})}
    if self._next == 0:
      self._filled, self._first, self._batch = 0, own, self._empty(rows)
    try:
      forms = [(each['like'], each['form']) for each in (self._first, own)]
      check_alike(self._chunks.source, *forms, ragged=self._chunks.ragged)
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
