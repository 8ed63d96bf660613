"""A directory whose files are copied into a bucket while a run writes them."""

import contextlib
import logging
import pathlib
import threading
from collections.abc import Callable, Collection

from hivit_jax.buckets.bucket import Bucket
from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)
SECONDS = 60.0  # between two looks for changes


class Mirror:
  """Copies what changes in a directory, checkpoints aside; use it as a context manager."""

  def __init__(
    self,
    bucket: Bucket,
    directory: pathlib.Path,
    leave_out: Collection[str],
    check: Callable[[bool], None],
  ):
    """Makes no copy yet.

    Args:
      bucket: where the copies go.
      directory: whose files are copied.
      leave_out: names of what is not copied, at the top.
      check: called before a copy with `patient`; raises UserError if it must not be made.
    """
    self._bucket, self._directory = bucket, directory
    self._leave_out, self._check = leave_out, check
    self.done = False  # everything was copied at the end
    self._known: dict[str, tuple[int, int]] = {}  # what was copied, by time of change and size
    self._mutex, self._ended = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._keep, name='mirror', daemon=True)

  def __enter__(self) -> 'Mirror':
    """Fetches the files at the top, which a run goes on to write; others only come to be."""
    names = [name for name in self._bucket.sizes() if '/' not in name]
    names = [name for name in names if name not in self._leave_out]
    self._bucket.download({name: self._directory / name for name in names})
    self._known = self._state()
    self._thread.start()
    return self

  def __exit__(self, kind, error, trace) -> None:
    self._ended.set()
    self._thread.join()
    try:
      self.push(patient=error is None)  # else it has been waited for, or the end is near
      self.done = True
    except UserError as trouble:
      if error is None:
        raise
      _log.error('%s', trouble)  # it must not hide the error that ends the run

  def push(self, *, patient: bool = True) -> None:
    """Copies what has changed since the last time; UserError if that is not possible."""
    with self._mutex:
      state = self._state()
      changed = [name for name, status in state.items() if self._known.get(name) != status]
      if not changed:
        return
      self._check(patient)
      try:
        self._bucket.upload({name: self._directory / name for name in changed}, patient=patient)
      except FileNotFoundError:  # one was for a moment only; all others were copied
        return
      self._known |= {name: state[name] for name in changed}

  def _keep(self) -> None:
    while not self._ended.wait(SECONDS):
      try:
        self.push()
      except UserError as error:  # the next checkpoint needs the bucket, and ends the run
        _log.warning('%s', error)

  def _state(self) -> dict[str, tuple[int, int]]:
    found = {}
    for path in self._directory.rglob('*'):
      name = path.relative_to(self._directory).as_posix()
      if name.partition('/')[0] in self._leave_out or path.suffix == '.tmp':
        continue
      with contextlib.suppress(FileNotFoundError):  # it has got its final name
        if path.is_file():
          found[name] = path.stat().st_mtime_ns, path.stat().st_size
    return found
