"""What a run prints on the terminal: log lines and the progress bar.

tqdm and absl are imported where they are needed, so that `--help` stays fast.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

_log = logging.getLogger(__name__)
_REFRESH_SECONDS = 0.1


class _Handler(logging.StreamHandler):
  """Writes above the progress bar instead of into it."""

  def emit(self, record: logging.LogRecord) -> None:
    bar = Progress.shown
    if bar is None:
      super().emit(record)
    else:
      with bar.external_write_mode(file=self.stream):
        super().emit(record)


def setup_logging(primary: bool = True) -> None:
  """Sends log messages to stderr as `12:34:56 I message`; call it once, after flags are parsed.

  Messages below WARNING are shown from this package only; absl's `--verbosity` still opens absl's
  own. Python warnings become log messages, so that they do not cut through the progress bar.

  Args:
    primary: whether this is process 0; the others show warnings only.
  """
  import absl.logging

  root = logging.getLogger()
  for handler in root.handlers[:]:  # absl's app.run has put its own there
    if isinstance(handler, _Handler | absl.logging.ABSLHandler) or _is_basic(handler):
      root.removeHandler(handler)
  handler = _Handler(sys.stderr)
  handler.setFormatter(logging.Formatter('%(asctime)s %(levelname).1s %(message)s', '%H:%M:%S'))
  root.addHandler(handler)
  root.setLevel(logging.WARNING)
  logging.getLogger('hivit_jax').setLevel(logging.INFO if primary else logging.WARNING)
  logging.captureWarnings(True)


def _is_basic(handler: logging.Handler) -> bool:
  """Whether Python put a handler there because a package logged before anyone had asked for one."""
  form = getattr(handler.formatter, '_fmt', None)
  return type(handler) is logging.StreamHandler and form == logging.BASIC_FORMAT


class Progress:
  """A progress bar on a terminal, and log lines anywhere else; use it as a context manager."""

  shown: Any = None  # the bar that log messages have to make room for

  def __init__(
    self,
    total: int,
    start_step: int = 0,
    *,
    title: str = '',
    interval_seconds: float = 10.0,
    stream: TextIO | None = None,
    primary: bool = True,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Shows the bar, if there is to be one.

    Args:
      total: the step, or the number of examples, at which the work ends.
      start_step: the step from which it goes on.
      title: what bar and log lines begin with; '': only lines do, with the word step.
      interval_seconds: the least time between two log lines; the first and the last always come.
      stream: the terminal; None: stderr.
      primary: whether this is process 0; the others show nothing.
      clock: seconds, for tests.
    """
    self._total = total
    self._title = title or 'step'
    self._interval = interval_seconds
    self._primary = primary
    self._clock = clock
    self._first: tuple[int, float] | None = None  # step and time of the first update
    self._last_shown = -math.inf
    self._bar = None
    terminal = stream or sys.stderr
    if primary and _has_width(terminal):
      import tqdm

      self._bar = Progress.shown = tqdm.tqdm(
        total=total,
        initial=start_step,
        desc=f'{title}: ' if title else None,
        file=terminal,
        dynamic_ncols=True,
        bar_format='{desc}{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}',
      )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows how far the work is; quick enough to be called for every example.

    Args:
      step: what has been reached, of `total`.
      metrics: what to show beside it, under short names, such as `loss` and `images/s`.
    """
    if not self._primary:
      return
    now = self._clock()
    eta = self._eta(step, now)
    interval = self._interval if self._bar is None else _REFRESH_SECONDS
    if now - self._last_shown < interval and step < self._total:
      return
    self._last_shown = now
    parts = [f'{name} {_short(value)}' for name, value in metrics.items()]
    if eta is not None:
      parts.append(f'ETA {eta}')
    if self._bar is not None:
      self._bar.n = step
      self._bar.set_postfix_str(', '.join(parts))
      return
    share = step / max(self._total, 1)
    _log.info('%s %d/%d (%.0f%%) %s', self._title, step, self._total, 100 * share, ', '.join(parts))

  def close(self) -> None:
    """Leaves the bar as it is and goes to the next line."""
    if self._bar is not None:
      self._bar.close()
      self._bar = Progress.shown = None

  def _eta(self, step: int, now: float) -> str | None:
    """Time to go as h:mm:ss, from the pace since the first update: compiling does not count."""
    if self._first is None:
      self._first = step, now
    first_step, first_time = self._first
    if step <= first_step:
      return None
    seconds = round((now - first_time) / (step - first_step) * (self._total - step))
    return f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'


def _has_width(stream: TextIO) -> bool:
  """Whether a stream is a terminal with room for a bar; some containers' have no columns."""
  try:
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
  except OSError:
    return False


def _short(value: float) -> str:
  value = float(value)
  return f'{value:.0f}' if 1000 <= abs(value) < 1e7 else f'{value:.4g}'
