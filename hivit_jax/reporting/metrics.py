"""What a run says and leaves behind: log lines, the progress bar, metrics, `config.json`.

Heavy imports (tensorboardX, tqdm, jax) are inside the functions that need them, so that `--help`
and the data workers stay fast.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import math
import numbers
import os
import pathlib
import platform
import shlex
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, TextIO, cast

from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)

_PACKAGES = (
  'hivit-jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'ml_collections',
  'numpy', 'pillow', 'tensorflow-datasets', 'tensorboardX',
)  # fmt: skip
ABSENT = '(absent)'


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
    if isinstance(handler, _Handler | absl.logging.ABSLHandler):
      root.removeHandler(handler)
  handler = _Handler(sys.stderr)
  handler.setFormatter(logging.Formatter('%(asctime)s %(levelname).1s %(message)s', '%H:%M:%S'))
  root.addHandler(handler)
  root.setLevel(logging.WARNING)
  logging.getLogger('hivit_jax').setLevel(logging.INFO if primary else logging.WARNING)
  logging.captureWarnings(True)


class Progress:
  """A progress bar on a terminal, and log lines anywhere else; use it as a context manager."""

  shown: Any = None  # the bar that log messages have to make room for

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    *,
    interval_seconds: float = 10.0,
    stream: TextIO | None = None,
    primary: bool = True,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Shows the bar, if there is to be one.

    Args:
      total_steps: the step at which the run ends.
      start_step: the step from which it goes on.
      interval_seconds: the least time between two log lines; the first and the last always come.
      stream: the terminal; None: stderr.
      primary: whether this is process 0; the others show nothing.
      clock: seconds, for tests.
    """
    self._total_steps = total_steps
    self._interval = interval_seconds
    self._primary = primary
    self._clock = clock
    self._first: tuple[int, float] | None = None  # step and time of the first update
    self._last_line = -math.inf
    self._bar = None
    terminal = stream or sys.stderr
    if primary and _has_width(terminal):
      import tqdm

      self._bar = Progress.shown = tqdm.tqdm(
        total=total_steps,
        initial=start_step,
        file=terminal,
        dynamic_ncols=True,
        bar_format='{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}',
      )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows how far the run is.

    Args:
      step: the step that has been reached.
      metrics: what to show beside it, under short names, such as `loss` and `images/s`.
    """
    if not self._primary:
      return
    parts = [f'{name} {_short(value)}' for name, value in metrics.items()]
    eta = self._eta(step)
    if eta is not None:
      parts.append(f'ETA {eta}')
    if self._bar is not None:
      self._bar.n = step
      self._bar.set_postfix_str(', '.join(parts))
      return
    now = self._clock()
    if now - self._last_line >= self._interval or step >= self._total_steps:
      self._last_line = now
      share = step / max(self._total_steps, 1)
      _log.info('step %d/%d (%.0f%%) %s', step, self._total_steps, 100 * share, ', '.join(parts))

  def close(self) -> None:
    """Leaves the bar as it is and goes to the next line."""
    if self._bar is not None:
      self._bar.close()
      self._bar = Progress.shown = None

  def _eta(self, step: int) -> str | None:
    """Time to go as h:mm:ss, from the pace since the first update: compiling does not count."""
    now = self._clock()
    if self._first is None:
      self._first = step, now
    first_step, first_time = self._first
    if step <= first_step:
      return None
    seconds = round((now - first_time) / (step - first_step) * (self._total_steps - step))
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
    _replace(path, kept)
    if len(rows) < len(lines):
      _log.info('%s: dropped %d lines after step %d', path, len(lines) - len(rows), start_step)
  return rows


def _replace(path: pathlib.Path, content: bytes) -> None:
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


def config_changes(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Compares a config with the one that `write_run_info` recorded.

  Returns:
    (recorded, now) by dotted key, such as `optim.lr`, for the keys that differ; ABSENT stands for
    a key that one of them does not have. Empty if nothing was recorded.
  """
  info = _read_run_info(pathlib.Path(workdir) / 'config.json')
  if info is None:
    return {}
  old, new = _dotted(info['config']), _dotted(_plain(config))
  return {
    key: (old.get(key, ABSENT), new.get(key, ABSENT))
    for key in dict.fromkeys([*new, *old])
    if old.get(key, ABSENT) != new.get(key, ABSENT)
  }


def write_run_info(
  workdir: str | os.PathLike[str], config: Mapping[str, Any], *, primary: bool = True
) -> dict[str, tuple[Any, Any]]:
  """Records in `config.json` how the run was started; a resumed run is added to the list there.

  The file has `config`, the newest resolved config, and `runs`: for each start the time, the
  command line, versions, devices, the git commit of the code if it is in a checkout, and what had
  changed in the config.

  Args:
    workdir: where the file goes; created if needed.
    config: nested dicts; what JSON does not know is written as a string.
    primary: whether this is process 0; the others only compare.

  Returns:
    What `config_changes` finds between the run before and this one.

  Raises:
    UserError: the file cannot be written.
  """
  path = pathlib.Path(workdir) / 'config.json'
  changes = config_changes(workdir, config)
  if not primary:
    return changes
  info = _read_run_info(path) or {'runs': []}
  run = _describe_run() | {'changed': {key: list(pair) for key, pair in changes.items()}}
  content = {'config': _plain(config), 'runs': [*info['runs'], run]}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(content, indent=2).encode() + b'\n')
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}; choose another --workdir') from error
  return changes


def _read_run_info(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    info = json.loads(path.read_bytes())
    if isinstance(info['config'], dict) and isinstance(info['runs'], list):
      return info
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (ValueError, TypeError, KeyError):
    pass
  _log.warning('%s is not what this program writes; it is not compared, and replaced', path)
  return None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """What a config looks like after a way through JSON: tuples are lists, keys are strings."""
  return json.loads(json.dumps(config, default=str))


def _dotted(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      flat |= _dotted(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _describe_run() -> dict[str, Any]:
  import jax

  versions = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  devices = jax.devices()
  return {
    'started': datetime.now().astimezone().isoformat(timespec='seconds'),
    'command': shlex.join([pathlib.Path(sys.executable).name, *sys.argv]),
    'git': _git_state(pathlib.Path(__file__)),
    'python': platform.python_version(),
    'platform': platform.platform(),
    'versions': versions,
    'devices': {
      'kind': devices[0].device_kind,
      'count': len(devices),
      'processes': jax.process_count(),
    },
  }


def _git_state(file: pathlib.Path) -> dict[str, Any] | None:
  """The commit of the checkout that tracks `file`, and whether there are changes; or None.

  A file that lies inside some checkout without being part of it (an environment in a project's
  folder) says nothing about the code.
  """

  def git(*arguments: str) -> str:
    command = ['git', '-C', str(file.parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

  try:
    git('ls-files', '--error-unmatch', file.name)
    return {'commit': git('rev-parse', 'HEAD'), 'dirty': bool(git('status', '--porcelain'))}
  except (OSError, subprocess.SubprocessError):
    return None
