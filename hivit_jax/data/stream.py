"""What stands where in the stream of examples, and loading a few neighbouring rows of it: a chunk.

The training stream is infinite: epoch after epoch, each a fresh permutation of all examples. Its
position p belongs to step p // batch_size, and what stands there - which example, how it is
augmented, what replaces it if it is broken - is a function of (seed, p) alone.
"""

import abc
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from hivit_jax.data.decode import MODES, BrokenImage, decode_image
from hivit_jax.data.sources.base import Source
from hivit_jax.errors import UserError

CHUNK_ROWS = 32  # At most; few enough that all cores work on one batch.
MAX_PROBES = 100  # Examples tried in place of a broken one.
LISTED = 20  # Broken examples listed in an error; the log has all of them.

Broken = list[tuple[int, str]]  # Index in the source, reason.


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

  A call returns the chunk's rows of every array of the batch, and for the account of broken
  examples 'broken' (`Broken`) and 'seen' (number of examples tried). An error is returned, not
  raised, as {'error': exception}: so it comes through threads, queues and processes in order and
  unharmed.
  """

  source: Source
  transform: Callable[..., np.ndarray]
  rows: Rows
  channels: int
  remedy: ClassVar[str]  # What becomes of a broken example, for the log.

  def __post_init__(self):
    if len(self.source) == 0:
      raise UserError(f'{self.source.name} ({self.source.split}) has no examples.')
    if self.channels not in MODES:
      raise UserError(f'channels={self.channels!r}: expected 3 (RGB) or 1 (greyscale).')

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

  def read(self, index: int) -> tuple[Image.Image, int]:
    """Reads and decodes an example; raises `BrokenImage`."""
    try:
      example = self.source[index]
    except UNREADABLE as error:
      raise BrokenImage(f'cannot be read: {error}') from error
    return decode_image(example['image'], channels=self.channels), example['label']

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


@dataclasses.dataclass(frozen=True)
class TrainChunks(Chunks):
  """Chunks of the training stream; see `loader.train_loader`."""

  seed: int
  remedy: ClassVar[str] = 'replaced by another'

  def load(self, positions: range) -> dict[str, Any]:
    images, broken = [], []
    labels = np.empty(len(positions), np.int32)
    for row, position in enumerate(positions):
      image, labels[row] = self._example(position, broken)
      images.append(image)
    seen = len(positions) + len(broken)
    return {'image': np.stack(images), 'label': labels, 'broken': broken, 'seen': seen}

  def _example(self, position: int, broken: Broken) -> tuple[np.ndarray, int]:
    epoch, place = divmod(position, len(self.source))
    index = int(epoch_order(len(self.source), self.seed, epoch)[place])
    rng = generator(self.seed, position)
    tried = []
    while len(tried) < MAX_PROBES:
      with self.named(index):
        try:
          image, label = self.read(index)
        except BrokenImage as error:
          tried.append((index, str(error)))
          index = int(rng.integers(len(self.source)))
        else:
          broken += tried
          return self.transform(image, rng), label
    names = [f'{example_name(self.source, i)} ({reason})' for i, reason in tried]
    raise UserError(
      f'{MAX_PROBES} examples of {self.source.name} ({self.source.split}), drawn one after the '
      f'other, are all broken: {listed(names)}'
    )


@dataclasses.dataclass(frozen=True)
class EvalChunks(Chunks):
  """Chunks of one pass over the source, and padding behind it; see `loader.eval_loader`."""

  remedy: ClassVar[str] = 'left out'

  def load(self, positions: range) -> dict[str, Any]:
    rows = len(positions)
    images, broken = {}, []
    label, index = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    for row, position in enumerate(positions):
      if position >= len(self.source):
        break
      index[row] = position
      with self.named(position):
        try:
          image, label[row] = self.read(position)
        except BrokenImage as error:
          broken.append((position, str(error)))
        else:
          images[row] = self.transform(image)
    mask = np.array([row in images for row in range(rows)])
    if not mask.all():
      blank = np.zeros_like(self.transform(Image.new(MODES[self.channels], (64, 64))))
      images = {row: images.get(row, blank) for row in range(rows)}
    return {
      'image': np.stack(list(images.values())),
      'label': label,
      'mask': mask,
      'index': index,
      'broken': broken,
      'seen': int((index >= 0).sum()),
    }


@functools.lru_cache(maxsize=4)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
  """Returns the permutation of an epoch, int32 (num_examples,); 45 ms for ImageNet, then kept."""
  # Positions stay below 2**63, so no example shares its key with an order.
  return generator(seed, 2**63 + epoch).permutation(np.arange(num_examples, dtype=np.int32))


def generator(seed: int, stream: int) -> np.random.Generator:
  """Returns independent generators for every (seed, stream): the two halves of Philox's key."""
  return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def example_name(source: Source, index: int) -> str:
  """Returns the name of an example, also where it would have to be read from a broken record."""
  try:
    return source.example_name(index)
  except UNREADABLE:
    return f'{source.name}/{source.split}[{index}]'


def listed(names: list[str]) -> str:
  """Returns the first `LISTED` names and the number of the others, as the end of a sentence."""
  rest = len(names) - LISTED
  return ', '.join(names[:LISTED]) + (f', and {rest} more' if rest > 0 else '') + '.'
