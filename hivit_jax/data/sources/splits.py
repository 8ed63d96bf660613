"""The split grammar and the fixed order of examples, shared by every kind of data set."""

import contextlib
import errno
import hashlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from hivit_jax.errors import UserError


@contextlib.contextmanager
def readable(root: str) -> Iterator[None]:
  """UserError, with the way out, if something in a folder cannot be read."""
  try:
    yield
  except OSError as error:
    mend = f' (chmod -R u+rX {shlex.quote(root)})' if error.errno == errno.EACCES else ''
    raise UserError(
      f'cannot read {error.filename}: {error.strerror}; make it readable{mend}, or move it away'
    ) from error


def hashed_order(keys: Iterable[bytes]) -> np.ndarray:
  """Orders keys by a hash of each: shuffled, yet the same on every machine and run.

  Keys keep their relative order when others are added or removed, so a slice such as `train[:90%]`
  stays nearly the same set when a few files come or go.

  Args:
    keys: names of examples, unique.

  Returns:
    (n,) int64 indices into `keys`.
  """
  digests = b''.join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
  return np.argsort(np.frombuffer(digests, dtype='>u8'), kind='stable')


class _SplitSizes(Mapping):
  """Split name -> TFDS's SplitInfo; sizes are asked for only where a split is used."""

  def __init__(self, names: Iterable[str], size: Callable[[str], int]):
    self._names = tuple(names)
    self._size = size

  def __getitem__(self, name: str):
    import tensorflow_datasets as tfds

    if name not in self._names:
      raise KeyError(name)
    return tfds.core.SplitInfo(name=name, shard_lengths=[self._size(name)], num_bytes=0)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


class SplitError(UserError):
  """A split that a data set does not have, or that has no examples."""


def parse_split(
  dataset: str, split: str, names: Iterable[str], size: Callable[[str], int], layout: str = ''
) -> list[tuple[str, int, int]]:
  """Resolves a split such as `train`, `train[:90%]` or `train[10%:]+validation[:500]`.

  The grammar is that of TFDS: names joined by `+`, each with an optional `[from:to]` in examples
  or per cent, negative values counting from the end; `all` is every split.

  Args:
    dataset: name of the data set, for messages.
    split: what the user asked for.
    names: the splits that there are.
    size: gives the number of examples of a split; called for the splits in use only.
    layout: what to add to the message about an unknown split.

  Returns:
    The parts in order: (split name, first index, index after the last), none of them empty.

  Raises:
    SplitError: for an unknown split, a slice that does not parse or fit, or one without examples.
  """
  from tensorflow_datasets.core.splits import AbstractSplit

  sizes = _SplitSizes(names, size)
  listing = ', '.join(sizes) or 'none'
  try:
    parts = AbstractSplit.from_spec(split).to_absolute(sizes)
  except (ValueError, KeyError, NotImplementedError) as error:
    reason = str(error).strip().splitlines()[-1] if str(error) else 'it does not parse'
    if 'Unknown split' in reason:
      raise SplitError(f'{dataset} has no split {split!r}; it has: {listing}{layout}') from None
    raise SplitError(
      f'{dataset}: cannot read the split {split!r}: {reason} Splits: {listing}; a slice is '
      f"written like 'train[:90%]', 'train[1000:]' or 'train[:500]+test'"
    ) from None
  ranges = []
  for part in parts:
    stop = sizes[part.splitname].num_examples if part.to is None else part.to
    ranges.append((part.splitname, part.from_ or 0, stop))
  ranges = [(name, start, stop) for name, start, stop in ranges if stop > start]
  if not ranges:
    raise SplitError(f'{dataset}: the split {split!r} selects no examples')
  return ranges
