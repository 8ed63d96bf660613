"""Loading a few neighbouring rows of the stream of examples: a chunk.

What stands at a position of the stream - which example, how it is augmented, what replaces it if it
is broken - is a function of (seed, position) alone; see `order`.
"""

import abc
import contextlib
import dataclasses
import math
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np

from hivit_jax.data.decode import BrokenImage
from hivit_jax.data.order import Order, Pass, generator
from hivit_jax.data.sources.base import Source
from hivit_jax.errors import UserError

CHUNK_ROWS = 32  # At most; few enough that all cores work on one batch.
MAX_PROBES = 100  # Examples tried in place of a broken one.
LISTED = 20  # Broken examples listed in an error; the log has all of them.

Broken = list[tuple[int, str]]  # Index in the source, reason.
Row = dict[str, np.ndarray]  # What a transform makes of one example.
Form = dict[str, tuple[np.dtype, tuple[int, ...]]]  # Its keys, types and shapes.
Stacked = dict[str, np.ndarray | list[np.ndarray]]  # Of several; a list where shapes may differ.

# What a source raises for an example that cannot be read: OSError for files, a missing one as well;
# array_record has only RuntimeError for missing and damaged files.
UNREADABLE = (OSError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Where a host's rows lie in the global batches, and how they are cut into chunks.

  Attributes:
    batch_size: Rows in a global batch.
    first: First row of this host in it.
    count: Rows of this host in it.
  """

  batch_size: int
  first: int
  count: int

  @property
  def chunks(self) -> int:
    """Chunks that make up this host's part of a batch."""
    return math.ceil(self.count / CHUNK_ROWS)

  def positions(self, chunk: int) -> range:
    """Returns the positions in the stream of a chunk, counted from the first of step 0."""
    step, part = divmod(chunk, self.chunks)
    start = step * self.batch_size + self.first
    return range(
      start + part * self.count // self.chunks, start + (part + 1) * self.count // self.chunks
    )


@dataclasses.dataclass(frozen=True)
class Chunks(abc.ABC):
  """Loads chunks by number, in whatever thread or process it is called.

  A call returns

  - 'rows': the chunk's rows of every array of the batch (`Stacked`),
  - 'like': index of an example that has the keys, types and shapes of these rows,
  - 'broken' and 'seen': broken examples (`Broken`), and the number of examples tried.

  An error is returned, not raised, as {'error': exception}: so it comes through threads, queues and
  processes in order and unharmed.
  """

  source: Source
  transform: Callable[..., Mapping[str, np.ndarray]]
  rows: Rows
  remedy: ClassVar[str]  # What becomes of a broken example, for the log.

  def __post_init__(self):
    if len(self.source) == 0:
      raise UserError(f'{self.source.name} ({self.source.split}) has no examples.')

  def __call__(self, chunk: int) -> dict[str, Any]:
    try:
      return self.load(self.rows.positions(chunk))
    except Exception as error:
      if multiprocessing.parent_process() is not None:
        error.add_note(traceback.format_exc())  # Pickling drops traceback and cause.
      return {'error': error}

  @abc.abstractmethod
  def load(self, positions: range) -> dict[str, Any]:
    """Loads what stands at these positions of the stream."""

  def row(self, index: int, *args: Any, **kwargs: Any) -> Row:
    """Reads an example and transforms it; raises `BrokenImage`."""
    try:
      example = self.source[index]
    except UNREADABLE as error:
      raise BrokenImage(f'cannot be read: {error}') from error
    row = self.transform(example, *args, **kwargs)
    if not isinstance(row, Mapping):
      raise TypeError(f'the transform returned a {type(row).__name__}, not a dict of arrays')
    arrays = {key: np.asarray(value) for key, value in row.items()}
    for key, array in arrays.items():
      if array.dtype.kind in 'OSU':
        raise TypeError(f'the transform returned {key!r} as {array.dtype}, not as numbers')
    return arrays

  @contextlib.contextmanager
  def named(self, index: int) -> Iterator[None]:
    """Adds the example to the message of an error that loading it raises."""
    try:
      yield
    except Exception as error:
      name = example_name(self.source, index)
      if isinstance(error, UserError):
        raise UserError(f'{name}: {error}') from error
      raise RuntimeError(f'{name}: {type(error).__name__}: {error}') from error

  @property
  def ragged(self) -> bool:
    """Whether arrays come as lists, because their shapes may differ."""
    return False

  def _stack(self, rows: list[tuple[int, Row]]) -> Stacked:
    """Stacks the rows of every key."""
    (like, model), *others = rows
    for index, row in others:
      check_alike(self.source, (like, form(model)), (index, form(row)), ragged=self.ragged)
    return {
      key: [row[key] for _, row in rows]
      if self.ragged and array.ndim
      else np.stack([row[key] for _, row in rows])
      for key, array in model.items()
    }

  def _all_broken(self, tried: Broken) -> UserError:
    names = [f'{example_name(self.source, i)} ({reason})' for i, reason in tried]
    return UserError(
      f'{len(tried)} examples of {self.source.name} ({self.source.split}), drawn one after the '
      f'other, are all broken: {listed(names)}'
    )


@dataclasses.dataclass(frozen=True)
class TrainChunks(Chunks):
  """Chunks of the training stream; see `loader.train_loader`."""

  seed: int
  order: Order
  remedy: ClassVar[str] = 'replaced by another'

  def load(self, positions: range) -> dict[str, Any]:
    broken: Broken = []
    rows = [self._example(position, broken) for position in positions]
    return {
      'rows': self._stack(rows),
      'like': rows[0][0],
      'broken': broken,
      'seen': len(rows) + len(broken),
    }

  def _example(self, position: int, broken: Broken) -> tuple[int, Row]:
    index = self.order.example(position)
    rng = generator(self.seed, position)
    tried = []
    while len(tried) < MAX_PROBES:
      with self.named(index):
        try:
          row = self.row(index, rng, **self.order.given(position, index))
        except BrokenImage as error:
          tried.append((index, str(error)))
          index = self.order.replacement(position, rng)
        else:
          broken += tried
          return index, row
    raise self._all_broken(tried)


@dataclasses.dataclass(frozen=True)
class EvalChunks(Chunks):
  """Chunks of one pass over the source, and padding; see `loader.eval_loader`."""

  order: Pass
  remedy: ClassVar[str] = 'left out'

  @property
  def ragged(self) -> bool:
    return getattr(self.transform, 'ragged', False)

  def load(self, positions: range) -> dict[str, Any]:
    found: dict[int, Row] = {}
    broken: Broken = []
    given = self.order.given(positions[0])
    index = [self.order.example(position) for position in positions]
    known = [i for i in index if i >= 0]
    for i in known:
      with self.named(i):
        try:
          found[i] = self.row(i, **given)
        except BrokenImage as error:
          broken.append((i, str(error)))
    like, row = next(iter(found.items()), None) or self._any_of(
      self.order.alike(positions[0]), given
    )
    for key in ('mask', 'index'):
      if key in row:
        raise UserError(f'{key!r} in what an evaluation transform returns: the loader adds its own')
    blank = {key: np.zeros_like(array) for key, array in row.items()}
    rows = [(i, found[i]) if i in found else (like, blank) for i in index]
    mask = {
      'mask': np.array([i in found for i in index]),
      'index': np.array(index, np.int32),
    }
    return {
      'rows': self._stack(rows) | mask,
      'like': like,
      'broken': broken,
      'seen': len(known),
    }

  def _any_of(self, indices: Sequence[int], given: Mapping[str, Any]) -> tuple[int, Row]:
    """Index and row of some example that is not broken: padding has its keys and shapes."""
    tried = []
    apart = math.ceil(len(indices) / MAX_PROBES)
    for index in map(int, indices[::apart]):
      with self.named(index):
        try:
          return index, self.row(index, **given)
        except BrokenImage as error:
          tried.append((index, str(error)))
    raise self._all_broken(tried)


def example_name(source: Source, index: int) -> str:
  """Returns the name of an example, also where it would have to be read from a broken record."""
  try:
    return source.example_name(index)
  except UNREADABLE:
    return f'{source.name}/{source.split}[{index}]'


def form(row: Mapping[str, Any]) -> Form:
  """Returns what has to be the same in all rows of a batch."""
  return {key: (array.dtype, array.shape) for key, array in row.items()}


def check_alike(
  source: Source, first: tuple[int, Form], second: tuple[int, Form], *, ragged: bool
) -> None:
  """Raises UserError unless two rows can be stacked.

  Args:
    source: Names the examples.
    first, second: Index of an example, and the form of its row.
    ragged: Shapes may differ, but for the number of dimensions.
  """
  (index, one), (other_index, other) = first, second
  if one.keys() != other.keys():
    _raise_unlike(source, index, ', '.join(one), other_index, ', '.join(other))
  for key, (dtype, shape) in one.items():
    other_dtype, other_shape = other[key]
    fits = len(shape) == len(other_shape) if ragged else shape == other_shape
    if dtype != other_dtype or not fits:
      described = f'{key!r} of {dtype} {shape}'
      _raise_unlike(source, index, described, other_index, f'of {other_dtype} {other_shape}')


def _raise_unlike(source: Source, index: int, one: str, other_index: int, other: str) -> NoReturn:
  names = example_name(source, index), example_name(source, other_index)
  raise UserError(
    f'the transform makes {one} from {names[0]}, but {other} from {names[1]}: it has to make them '
    'equal before they can be one batch'
  )


def listed(names: list[str]) -> str:
  """Returns the first `LISTED` names and the number of the others, as the end of a sentence."""
  rest = len(names) - LISTED
  return ', '.join(names[:LISTED]) + (f', and {rest} more' if rest > 0 else '') + '.'
