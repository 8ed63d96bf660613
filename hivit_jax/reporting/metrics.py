"""Metrics of a run: one JSON object per line, and whatever trackers are asked for."""

import json
import logging
import math
import numbers
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hivit_jax.errors import UserError
from hivit_jax.reporting import trackers
from hivit_jax.reporting.files import WholeFile, replace
from hivit_jax.reporting.writer import Writer

_log = logging.getLogger(__name__)


class MetricWriter:
  """Writes metrics to `metrics.jsonl` and to trackers."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    start_step: int = 0,
    primary: bool = True,
    tracked_by: Sequence[str] = ('tensorboard',),
    config: Mapping[str, Any] = MappingProxyType({}),
  ):
    """Opens the files and takes back what an interrupted run had written after `start_step`.

    Args:
      workdir: where the files go; created if needed.
      start_step: the step that the run goes on from. Later lines, and a line that was cut off, are
        dropped; TensorBoard is told to forget the later events.
      primary: whether this is process 0; the others write nothing.
      tracked_by: names of trackers, as in `config.trackers`.
      config: nested settings of the run, which trackers show.

    Raises:
      UserError: the files cannot be written, or a tracker cannot be opened.
    """
    self._writers: list[Writer] = []
    if not primary:
      return
    workdir = pathlib.Path(workdir)
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      self._writers.append(JsonLines(workdir / 'metrics.jsonl', start_step))
      for opened in trackers.opened(tracked_by, workdir, start_step, config):
        self._writers.append(opened)
    except OSError as error:
      self.close()
      raise UserError(
        f'cannot write metrics to {workdir}: {error.strerror}; choose another --workdir'
      ) from error
    except UserError:
      self.close()
      raise

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    self.close(error)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes numbers, and sees that they are in the files before it returns.

    Args:
      step: the step to which they belong.
      metrics: Python, numpy or jax scalars by name, such as `train/loss`.

    Raises:
      OSError: the disk is full, for example.
    """
    scalars = {
      name: int(value) if isinstance(value, numbers.Integral) else float(value)
      for name, value in metrics.items()
    }
    for writer in self._writers:
      writer.write(int(step), scalars)

  def write_image(self, step: int, tag: str, image: Any) -> None:
    """Sends a picture to the trackers.

    Args:
      step: the step to which it belongs.
      tag: its name there.
      image: (H, W, C) uint8, C one of 1, 3, 4.
    """
    if image.dtype != 'uint8' or image.ndim != 3 or image.shape[2] not in (1, 3, 4):
      raise ValueError(f'{tag}: expected (H, W, C) uint8, got {image.shape} {image.dtype}')
    for writer in self._writers:
      writer.write_image(step, tag, image)

  def close(self, error: BaseException | None = None) -> None:
    """Closes the files; nothing can be written any more. Trackers show a run with an error so."""
    for writer in self._writers:
      writer.close(error)


class JsonLines:
  """A file with one JSON object per line, `step` first.

  What is written for the step of the last line is added to that line, so training and evaluation
  metrics of a step share one. A NaN or an infinity becomes null: JSON has neither, and pandas reads
  null as NaN.
  """

  def __init__(self, path: pathlib.Path, start_step: int):
    """Opens the file, and drops its lines after `start_step` and a line that was cut off."""
    rows = _take_back(path, start_step)
    self._file = WholeFile(path, 'r+b')
    self._end = self._file.seek(0, os.SEEK_END)
    self._last_row = rows[-1] if rows else {}
    self._last_start = self._end - len(_line(self._last_row)) if rows else self._end

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    row = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    if self._last_row.get('step') == step:
      row = self._last_row | row
    else:
      row = {'step': step} | row
      self._last_start = self._end
    line = _line(row)
    self._file.seek(self._last_start)
    self._file.write(line)  # one write, one line
    self._file.truncate()
    self._end = self._last_start + len(line)
    self._last_row = row

  def write_image(self, step: int, tag: str, image: Any) -> None:
    """Does nothing: pictures do not go into this file."""

  def close(self, error: BaseException | None = None) -> None:
    self._file.close()


def _line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row, allow_nan=False).encode() + b'\n'


def _take_back(path: pathlib.Path, start_step: int) -> list[dict[str, Any]]:
  """Leaves, in `path`, the rows up to `start_step`, and returns them; creates an empty file."""
  content = path.read_bytes() if path.exists() else None
  rows = [row for row in rows_in(content or b'') if row['step'] <= start_step]
  kept = b''.join(map(_line, rows))
  if kept != content:
    replace(path, kept)
    dropped = len((content or b'').splitlines()) - len(rows)
    if dropped:
      _log.info('%s: dropped %d lines after step %d', path, dropped, start_step)
  return rows


def rows_in(content: bytes) -> Iterator[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, without lines that a kill has cut off."""
  for line in content.splitlines():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      yield row
