"""One run at a time in a bucket: a lock that a run keeps renewing, and that ends without it.

The lock is the object `lock`. It is created, renewed and taken over by conditional writes, of which
the server lets one succeed. Clocks need not agree: who finds the lock held watches for as long as
it lasts, by its own clock, whether it is renewed.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any

from hivit_jax.buckets.bucket import Bucket
from hivit_jax.buckets.stores import Conflict
from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)
NAME = 'lock'
SECONDS = 60.0  # that a lock lasts unless it is renewed
_WAY_OUT = 'wait until it ends, stop it, or choose another --workdir'


class Lease:
  """Keeps other runs out of a place in a bucket, as a context manager."""

  def __init__(self, bucket: Bucket, seconds: float = SECONDS):
    """Asks no server yet; `seconds` must be the same for all runs."""
    self._bucket, self._seconds = bucket, seconds
    since = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
    self._holder = {
      'id': secrets.token_hex(16),
      'by': f'process {os.getpid()} on {socket.gethostname()} since {since}',
      'pid': os.getpid(),
      'started': _started(os.getpid()),
      'kernel': _kernel(),
    }
    self._version, self._beat = '', 0
    self._lost: str | None = None
    self._mutex, self._ended = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._keep, name='lease', daemon=True)

  def __enter__(self) -> 'Lease':
    """Takes the lock.

    If it is held, this waits to see whether it is renewed. What a killed process of this machine
    has left is taken at once.

    Raises:
      UserError: another run holds it.
    """
    self._take()
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._ended.set()
    self._thread.join()
    with contextlib.suppress(UserError, Conflict):  # then it ends without us, after a while
      self._bucket.write(NAME, b'', self._version, patient=False)

  def check(self, patient: bool = True) -> None:
    """Renews the lock; UserError if another run has taken it over."""
    self._renew(patient)

  def _take(self) -> None:
    seen, since, told = None, 0.0, False
    while True:
      found = self._bucket.read(NAME)
      held = _parsed(found.content) if found else {}
      version = found.version if found else ''
      if held and not _gone(held):
        if seen is None:
          seen, since = version, time.monotonic()
        if version != seen:
          raise UserError(
            f'{self._bucket.address} is in use by another run, {held.get("by")}; {_WAY_OUT}'
          )
        waited = time.monotonic() - since
        if waited < self._seconds:
          if waited > self._seconds / 2 and not told:
            told = True
            _log.info(
              '%s is locked by %s, which does not renew the lock; waiting for it to end in %.0f s',
              self._bucket.address, held.get('by'), self._seconds - waited,
            )  # fmt: skip
          time.sleep(self._seconds / 30)
          continue
      try:
        self._version = self._bucket.write(NAME, self._content(), version)
        return
      except Conflict:  # by another run, or by an attempt of ours whose answer was lost
        if self._is_ours():
          return

  def _renew(self, patient: bool) -> None:
    with self._mutex:
      if self._lost is None:
        try:
          self._version = self._bucket.write(NAME, self._content(), self._version, patient=patient)
        except Conflict:
          if not self._is_ours():
            found = self._bucket.read(NAME)
            self._lost = str(_parsed(found.content if found else b'').get('by', 'which has ended'))
      if self._lost is not None:
        raise UserError(
          f'{self._bucket.address} was taken over by another run, {self._lost}, while this one '
          f'could not reach it for {self._seconds:.0f} seconds; this one stops'
        )

  def _keep(self) -> None:
    while not self._ended.wait(self._seconds / 6):
      with contextlib.suppress(UserError):  # `check` tells what is lost; an outage may pass
        self._renew(patient=False)

  def _content(self) -> bytes:
    self._beat += 1  # another content is another version
    return json.dumps(self._holder | {'beat': self._beat}).encode()

  def _is_ours(self) -> bool:
    found = self._bucket.read(NAME)
    if found and _parsed(found.content).get('id') == self._holder['id']:
      self._version = found.version
      return True
    return False


def _parsed(content: bytes) -> dict[str, Any]:
  try:
    return json.loads(content) if content else {}
  except ValueError:
    return {'by': 'unknown'}


def _gone(held: dict[str, Any]) -> bool:
  """Whether it is certain that the holder has ended: a process that this one would see."""
  kernel = _kernel()
  return bool(kernel) and held.get('kernel') == kernel and _started(held['pid']) != held['started']


def _kernel() -> str:
  """Names the running kernel and which of its processes can be seen; '' if not known."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _started(pid: int) -> str:
  """When a process was started, as the kernel counts; '' if there is none, or it is a zombie."""
  try:
    fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return ''
  return '' if fields[0] in 'ZX' else fields[19]
