"""How far a preparation is: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_log = logging.getLogger(__name__)

T = TypeVar('T')
_SECONDS_BETWEEN_LINES = 30


class Progress:
  """Counts examples; to be used in a `with` statement."""

  def __init__(self, title: str, total: int):
    self._title = title
    self._total = total
    self._done = 0
    self._skipped = 0
    self._start = self._last_line = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm(total=total, desc=title, unit=' images', leave=False)

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *error) -> None:
    if self._bar is not None:
      self._bar.close()

  def skip(self, count: int) -> None:
    """Counts examples that an earlier run has done."""
    self._done += count
    self._skipped += count
    if self._bar is not None:  # counted without a share in the rate
      self._bar.initial += count
      self._bar.n += count
      self._bar.last_print_n += count

  def count(self, examples: Iterable[T]) -> Iterator[T]:
    """Yields the examples, counting each."""
    for example in examples:
      yield example
      self._done += 1
      if self._bar is not None:
        self._bar.update(1)
      elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
        self._log()

  def _log(self) -> None:
    self._last_line = time.monotonic()
    rate = (self._done - self._skipped) / (self._last_line - self._start)
    minutes = (self._total - self._done) / rate / 60
    _log.info(
      '%s: %d of %d images, %.0f a second, %.0f min left',
      *(self._title, self._done, self._total, rate, minutes),
    )
