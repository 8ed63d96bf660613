"""Orders for images of many sizes: each batch is on one of a few canvases, its bucket.

Which one is known from the sizes of all images and from the random numbers that decide how they are
augmented, before any is read: a pure function of seed and step, the same on every host.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hivit_jax.data.detection_transforms import DRAWS
from hivit_jax.data.order import generator
from hivit_jax.errors import UserError

Canvases = Sequence[tuple[int, int]]

_LOCK = threading.Lock()  # threads wait for a plan, instead of making it several times
_OWN = 0.9  # share of replacements that are of the same bucket
_STREAM = 3 << 62  # of random numbers; examples and shuffles have others, see `order`


def smallest(sizes: np.ndarray, canvases: Canvases) -> np.ndarray:
  """(n,) the smallest canvas that each size (n, 2) fits on, as an index.

  Raises:
    UserError: a size fits on none.
  """
  table = np.array(canvases)
  fits: Any = (sizes[:, None] <= table).all(axis=2)
  if not fits.any(axis=1).all():
    height, width = sizes[int(np.argmin(fits.any(axis=1)))]
    known = ', '.join(f'{h}x{w}' for h, w in canvases)
    raise UserError(
      f'an image would become {height}x{width} pixels, which fits on none of the canvases {known} '
      'of config.detect.buckets or eval_buckets; add a larger one, or reduce the sides that images '
      'are resized to'
    )
  return np.where(fits, table.prod(axis=1), np.iinfo(np.int64).max).argmin(axis=1)


class _Epoch(NamedTuple):
  """Random numbers (n, DRAWS) of all examples; the members of each bucket, shuffled."""

  draws: np.ndarray
  members: list[np.ndarray]


class Bucketed:
  """A permutation of all examples per epoch; the examples of a step are of one bucket.

  Examples that do not fill a batch of their bucket wait for the next epoch: none is left out or
  repeated. To plan an epoch, those before it have to be counted.
  """

  def __init__(
    self,
    sizes: np.ndarray,
    augmented: Callable[[np.ndarray, np.ndarray], np.ndarray],
    canvases: Canvases,
    *,
    batch_size: int,
    seed: int,
  ):
    """Plans nothing yet.

    Args:
      sizes: (n, 2) height and width of all examples.
      augmented: these and (n, DRAWS) numbers in [0, 1) -> (n, 2) sizes that images become.
      canvases: of the buckets.
      batch_size: examples in a step, over all hosts.
      seed: 0 <= seed < 2**63.
    """
    self._sizes, self._augmented = sizes, augmented
    self._canvases = [(int(height), int(width)) for height, width in canvases]
    self._batch_size, self._seed = batch_size, seed
    # Members of each bucket before an epoch, for all epochs that were planned.
    self._before = [np.zeros(len(canvases), np.int64)]
    self._steps_before = [0]

  def example(self, position: int) -> int:
    epoch, bucket, place = self._find(position)
    return int(_epoch(self, epoch).members[bucket][place])

  def replacement(self, position: int, rng: np.random.Generator) -> int:
    epoch, bucket, _ = self._find(position)
    plan = _epoch(self, epoch)
    # A bucket may have no other, so now and then any example that fits has its chance.
    if rng.random() < _OWN:
      return int(rng.choice(plan.members[bucket]))
    fits = (self._augmented(self._sizes, plan.draws) <= self._canvases[bucket]).all(axis=1)
    return int(rng.choice(np.flatnonzero(fits)))

  def given(self, position: int, index: int) -> dict[str, Any]:
    epoch, bucket, _ = self._find(position)
    return {'shape': self._canvases[bucket], 'draws': _epoch(self, epoch).draws[index]}

  def _find(self, position: int) -> tuple[int, int, int]:
    """The epoch of the example at a position, its bucket, and its place among the members."""
    step, row = divmod(position, self._batch_size)
    with _LOCK:
      while self._steps_before[-1] <= step:
        self._count_epoch()
      epoch = int(np.searchsorted(self._steps_before, step, side='right')) - 1
      bucket, batch = _steps(self, epoch)[step - self._steps_before[epoch]]
      place = batch * self._batch_size + row
      while self._before[epoch][bucket] > place:  # it has waited
        epoch -= 1
      _epoch(self, epoch)  # while nobody else does it
    return epoch, int(bucket), int(place - self._before[epoch][bucket])

  def _count_epoch(self) -> None:
    counts = [len(own) for own in _epoch(self, len(self._before) - 1).members]
    self._before.append(self._before[-1] + counts)
    self._steps_before.append(int((self._before[-1] // self._batch_size).sum()))

  def plan(self, epoch: int) -> _Epoch:
    """Draws for all examples, and sorts them into buckets."""
    rng = generator(self._seed, _STREAM + epoch)
    draws = rng.random((len(self._sizes), DRAWS))
    bucket = smallest(self._augmented(self._sizes, draws), self._canvases)
    shuffled = rng.permutation(len(bucket))
    return _Epoch(draws, [shuffled[bucket[shuffled] == k] for k in range(len(self._canvases))])

  def steps(self, epoch: int) -> np.ndarray:
    """(steps, 2) buckets, and numbers of batches of these, in the order of training."""
    first, last = (self._before[e] // self._batch_size for e in (epoch, epoch + 1))
    rows = [(k, batch) for k in range(len(first)) for batch in range(first[k], last[k])]
    order = generator(self._seed, _STREAM + 2**61 + epoch).permutation(len(rows))
    return np.array(rows, np.int64).reshape(-1, 2)[order]


# Members of rare buckets wait for many epochs.
_epoch = functools.lru_cache(maxsize=16)(Bucketed.plan)
_steps = functools.lru_cache(maxsize=16)(Bucketed.steps)


@dataclasses.dataclass(frozen=True, eq=False)
class BucketedPass:
  """One pass over all examples, bucket by bucket, each filled up to whole batches.

  Attributes:
    sizes: (n, 2) that all examples become.
    indices: (positions,) of examples, -1: padding.
    buckets: (steps,) indices of canvases.
    canvases: of the buckets.
    batch_size: over all hosts.
  """

  sizes: np.ndarray
  indices: np.ndarray
  buckets: np.ndarray
  canvases: Canvases
  batch_size: int

  @classmethod
  def of(cls, sizes: np.ndarray, canvases: Canvases, batch_size: int) -> 'BucketedPass':
    """The pass over examples that become `sizes` (n, 2)."""
    bucket = smallest(sizes, canvases)
    parts, buckets = [], []
    for k in range(len(canvases)):
      members = np.flatnonzero(bucket == k)
      padding = -len(members) % batch_size
      parts.append(np.concatenate([members, np.full(padding, -1)]))
      buckets += [k] * (len(parts[-1]) // batch_size)
    return cls(sizes, np.concatenate(parts), np.array(buckets), canvases, batch_size)

  @property
  def steps(self) -> int:
    return len(self.buckets)

  def example(self, position: int) -> int:
    return int(self.indices[position])

  def alike(self, position: int) -> Sequence[int]:
    bucket = self.buckets[position // self.batch_size]
    own = self.indices.reshape(-1, self.batch_size)[self.buckets == bucket]
    fits = np.flatnonzero((self.sizes <= self.canvases[bucket]).all(axis=1))
    return [*own[own >= 0].tolist(), *np.setdiff1d(fits, own).tolist()]

  def given(self, position: int) -> dict[str, Any]:
    height, width = self.canvases[self.buckets[position // self.batch_size]]
    return {'shape': (height, width)}
