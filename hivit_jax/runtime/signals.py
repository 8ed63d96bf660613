"""SIGTERM and SIGINT while training: finish cleanly, but never keep the user waiting."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 1.0


class Interrupted(Exception):
  """A signal came in a part of the program that may be given up; see `StopSignals`."""


class StopSignals:
  """Notes the first SIGTERM or SIGINT; a second one ends the process at once. A context manager.

  What follows within a second is the first one again: wrapper scripts pass on a signal that the
  whole process group has got already.

  Python runs signal handlers between its own instructions, so not while XLA compiles or the main
  thread waits for the device. A thread of ours hears every signal as it comes, acknowledges it, and
  ends the process at the second one, whatever the main thread is doing.

  Attributes:
    received: name of the signal, or None.
  """

  def __init__(self):
    self.received: str | None = None
    self._interruptible = False

  def __enter__(self) -> 'StopSignals':
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
    self._watcher = threading.Thread(target=self._watch, name='signals', daemon=True)
    self._watcher.start()
    return self

  def __exit__(self, *exc_info) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_fd)
    os.close(self._writer)
    self._watcher.join()
    os.close(self._reader)

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """In this block a signal raises `Interrupted`, at once or, if it came before, on entry."""
    self._interruptible = True
    try:
      if self.received:
        raise Interrupted
      yield
    finally:
      self._interruptible = False

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.received = self.received or signal.Signals(number).name
    if self._interruptible:
      self._interruptible = False
      raise Interrupted

  def _watch(self) -> None:
    first = None
    while numbers := os.read(self._reader, 64):
      for number in set(_SIGNALS).intersection(numbers):
        name = signal.Signals(number).name
        now = time.monotonic()
        if first is None:
          first = now
          _log.warning(
            '%s: stopping after the current step or compilation; '
            'a second signal ends this at once, without saving',
            name,
          )
        elif now - first > _SAME_SECONDS:
          os.write(2, f'{name} again: stopped at once\n'.encode())  # a log handler may be locked
          os._exit(128 + number)
