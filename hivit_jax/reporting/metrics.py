"""Metrics of a run: one JSON object a line, and TensorBoard files.

tensorboardX and PIL are imported where they are needed, so that `--help` stays fast.
"""

import contextlib
import io
import json
import logging
import math
import numbers
import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)


class MetricWriter:
  """Writes metrics to `metrics.jsonl` and to TensorBoard files under `tensorboard/`.

  `metrics.jsonl` has one JSON object a line, `step` first. What is written for the step of the
  last line is added to that line, so training and evaluation metrics of a step share one. A NaN or
  an infinity becomes null (JSON has neither; pandas reads null as NaN); TensorBoard gets it as is.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, start_step: int = 0, primary: bool = True):
    """Opens the files and takes back what an interrupted run had written after `start_step`.

    Args:
      workdir: where the files go; created if needed.
      start_step: the step that the run goes on from. Later lines, and a line that was cut off, are
        dropped; TensorBoard is told to forget the later events.
      primary: whether this is process 0; the others write nothing.

    Raises:
      UserError: the files cannot be written.
    """
    self._primary = primary
    if not primary:
      return
    workdir = pathlib.Path(workdir)
    path = workdir / 'metrics.jsonl'
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      rows = _take_back(path, start_step)
      self._file = open(path, 'r+b', buffering=0)  # one write, one line  # noqa: SIM115
      self._end = self._file.seek(0, os.SEEK_END)
      self._last_row = rows[-1] if rows else {}
      self._last_start = self._end - len(_line(self._last_row)) if rows else self._end
      self._events = _EventFile(workdir / 'tensorboard', start_step)
    except OSError as error:
      raise UserError(
        f'cannot write metrics to {workdir}: {error.strerror}; choose another --workdir'
      ) from error

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes numbers, and sees that they are in the files before it returns.

    Args:
      step: the step to which they belong.
      metrics: Python, numpy or jax scalars by name, such as `train/loss`.

    Raises:
      OSError: the disk is full, for example.
    """
    if not self._primary:
      return
    values = {
      name: int(value) if isinstance(value, numbers.Integral) else float(value)
      for name, value in metrics.items()
    }
    row = {name: value if math.isfinite(value) else None for name, value in values.items()}
    if self._last_row.get('step') == step:
      row = self._last_row | row
    else:
      row = {'step': int(step)} | row
      self._last_start = self._end
    line = _line(row)
    self._file.seek(self._last_start)
    _write(self._file, line)
    self._file.truncate()
    self._end = self._last_start + len(line)
    self._last_row = row
    self._events.scalars(step, values)

  def write_image(self, step: int, tag: str, image: Any) -> None:
    """Writes a picture to TensorBoard.

    Args:
      step: the step to which it belongs.
      tag: its name there.
      image: (H, W, C) uint8, C one of 1, 3, 4.
    """
    if not self._primary:
      return
    if image.dtype != 'uint8' or image.ndim != 3 or image.shape[2] not in (1, 3, 4):
      raise ValueError(f'{tag}: expected (H, W, C) uint8, got {image.shape} {image.dtype}')
    self._events.image(step, tag, image)

  def close(self) -> None:
    """Closes the files; nothing can be written any more."""
    if self._primary:
      self._file.close()
      self._events.close()


def _write(file: io.FileIO, data: bytes) -> None:
  while data:  # when a disk becomes full, a part is written without a word
    data = data[file.write(data) :]


def _line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row, allow_nan=False).encode() + b'\n'


def _take_back(path: pathlib.Path, start_step: int) -> list[dict[str, Any]]:
  """Leaves, in `path`, the rows up to `start_step`, and returns them; creates an empty file."""
  content = path.read_bytes() if path.exists() else None
  rows, lines = [], (content or b'').splitlines()
  for line in lines:
    try:
      row = json.loads(line)
      if row['step'] <= start_step:
        rows.append(row)
    except (ValueError, TypeError, KeyError):
      continue  # cut off by a kill
  kept = b''.join(map(_line, rows))
  if kept != content:
    replace(path, kept)
    if len(rows) < len(lines):
      _log.info('%s: dropped %d lines after step %d', path, len(lines) - len(rows), start_step)
  return rows


def replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a reader, and a kill, find either the old or the new content."""
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_bytes(content)
  temporary.replace(path)


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """Hides PyTorch, which tensorboardX imports if it finds it, and which takes a second."""
  hide = 'torch' not in sys.modules
  if hide:
    sys.modules['torch'] = None  # type: ignore[assignment]
  try:
    yield
  finally:
    if hide:
      del sys.modules['torch']


class _EventFile:
  """A TensorBoard event file in which everything is as soon as it is written.

  tensorboardX's own SummaryWriter passes events to a thread for which `flush` does not wait, so a
  kill would lose some; what is taken from it are the message types and the checksum.
  """

  def __init__(self, directory: pathlib.Path, start_step: int):
    with _without_torch():
      from tensorboardX.proto import event_pb2, summary_pb2
      from tensorboardX.record_writer import masked_crc32c

    # protobuf makes these classes at import: a type checker cannot see them.
    events, summaries = cast(Any, event_pb2), cast(Any, summary_pb2)
    self._event_type, self._summary = events.Event, summaries.Summary
    self._crc = masked_crc32c
    directory.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()  # TensorBoard reads the files in the order of their names
    name = f'events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}'
    self._file = open(directory / name, 'xb', buffering=0)  # noqa: SIM115
    self._write(file_version='brain.Event:2')
    start = events.SessionLog(status=events.SessionLog.START)
    self._write(step=start_step + 1, session_log=start)  # earlier files' later events are void

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    pairs = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    self._write(step=step, summary=self._summary(value=pairs))

  def image(self, step: int, tag: str, image: Any) -> None:
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(png, 'PNG')
    height, width, channels = image.shape
    picture = self._summary.Image(
      height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
    )
    self._write(step=step, summary=self._summary(value=[{'tag': tag, 'image': picture}]))

  def close(self) -> None:
    self._file.close()

  def _write(self, **fields: Any) -> None:
    data = self._event_type(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack('<Q', len(data))
    crcs = [struct.pack('<I', self._crc(part)) for part in (length, data)]
    _write(self._file, length + crcs[0] + data + crcs[1])
