"""From the chunks of a batch to the batch."""

from typing import Any

import grain
import numpy as np

from hivit_jax.data.stream import Chunks, Form, Stacked, check_alike, form


class Joined(grain.IterDataset):
  """Joins the chunks of each batch, in the thread that iterates.

  Every batch has memory of its own and is the receiver's to keep: JAX may use it where it lies,
  without a copy. Chunks of worker processes lie in shared memory, which joining frees.

  Each chunk comes out without its rows, but the last one of a batch with those of the batch. A
  chunk that does not fit the first one of its batch becomes {'error': UserError}.
  """

  def __init__(self, parent: grain.IterDataset, chunks: Chunks):
    """Takes from `parent` what `chunks` load, in their order, from the first one of a batch on."""
    super().__init__(parent)
    self._chunks = chunks

  def __iter__(self) -> '_Joining':
    return _Joining(self._parent.__iter__(), self._chunks)


class _Joining(grain.DatasetIterator):
  """See `Joined`."""

  def __init__(self, parent: grain.DatasetIterator, chunks: Chunks):
    super().__init__(parent)
    self._chunks = chunks
    self._parts: list[dict[str, Any]] = []  # Of the batch, until now.

  def get_state(self) -> dict[str, Any]:
    # Asked for with every chunk when threads load ahead. The state of worker processes would be
    # expensive, and nobody needs it: the step number is the state.
    return {}

  def set_state(self, state: dict[str, Any]) -> None:
    raise NotImplementedError

  def __next__(self) -> dict[str, Any]:
    chunk = next(self._parent)
    if 'error' in chunk:
      return chunk
    self._parts.append(chunk)
    first, rows = self._parts[0], chunk['rows']
    try:
      forms = [(part['like'], _form(part['rows'])) for part in (first, chunk)]
      check_alike(self._chunks.source, *forms, ragged=self._chunks.ragged)
    except Exception as error:
      return {'error': error}
    done = {key: chunk[key] for key in ('broken', 'seen')}
    if len(self._parts) < self._chunks.rows.chunks:
      return done
    parts, self._parts = self._parts, []
    return done | {'rows': {key: _joined([part['rows'][key] for part in parts]) for key in rows}}


def _form(rows: Stacked) -> Form:
  return form({key: values[0] for key, values in rows.items()})


def _joined(parts: list[np.ndarray] | list[list[np.ndarray]]) -> np.ndarray | list[np.ndarray]:
  if isinstance(parts[0], list):
    return [np.array(row) for part in parts for row in part]
  return np.concatenate(parts)
