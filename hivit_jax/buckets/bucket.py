"""A place in a bucket: names below it, patience with its server, and errors in one line."""

import concurrent.futures
import logging
import os
import pathlib
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hivit_jax.buckets import stores
from hivit_jax.buckets.stores import Conflict, Found
from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)
PATIENCE = 300.0  # seconds that a server may be away
_LONGEST_PAUSE = 30.0
_AT_ONCE = 8  # files that are copied


def is_address(path: Any) -> bool:
  """Whether a path is the address of a bucket or of something else on a network."""
  return isinstance(path, str) and re.match(r'\w+://', path) is not None


class Bucket:
  """What lies below one address, such as `gs://bucket/runs/mae`.

  Every method tries again, for `PATIENCE` seconds, when the server cannot be reached or has trouble
  of its own. It raises UserError, with the address and the reason, if that does not help or cannot.
  """

  def __init__(self, address: str):
    """Raises UserError if the address is not of this form or its package is absent."""
    scheme, _, rest = address.partition('://')
    if scheme not in stores.KINDS:
      raise UserError(
        f'{address}: buckets are gs://BUCKET/PATH and s3://BUCKET/PATH; mount others as a file '
        'system, or use a local disk or NFS'
      )
    name, *parts = [part for part in rest.split('/') if part] or ['']
    if not parts or {'.', '..'} & set(parts):
      raise UserError(f'{address}: name a place in the bucket, such as {scheme}://{name}/runs/mae')
    self.address = f'{scheme}://{"/".join((name, *parts))}'
    self._prefix = '/'.join(parts)
    self._store = stores.opened(scheme, name)

  def sizes(self, below: str = '') -> dict[str, int]:
    """Sizes of the objects by name, of those whose names begin with `below`."""
    start = f'{self._prefix}/'
    found = self._patient(lambda: self._store.sizes(start + below))
    return {name.removeprefix(start): size for name, size in found.items()}

  def is_object(self) -> bool:
    """Whether the address itself is that of an object."""
    return self._prefix in self._patient(lambda: self._store.sizes(self._prefix))

  def read(self, name: str, *, patient: bool = True) -> Found | None:
    """An object, None if there is none."""
    return self._patient(lambda: self._store.read(self._at(name)), patient)

  def write(
    self, name: str, content: bytes, expected: str | None = None, *, patient: bool = True
  ) -> str:
    """Writes an object, see `Store.write`; with Conflict it may have been this call that wrote."""
    return self._patient(lambda: self._store.write(self._at(name), content, expected), patient)

  def upload(self, files: Mapping[str, pathlib.Path], *, patient: bool = True) -> None:
    """Copies files into the bucket, by name."""
    self._each(lambda name: self._store.upload(files[name], self._at(name)), files, patient)

  def download(self, files: Mapping[str, pathlib.Path]) -> None:
    """Copies objects into files, whose directories are made."""
    for path in files.values():
      path.parent.mkdir(parents=True, exist_ok=True)
    self._each(lambda name: self._store.download(self._at(name), files[name]), files, True)

  def delete(self, names: Iterable[str]) -> None:
    """Deletes objects, of which some may not exist."""
    names = [self._at(name) for name in names]
    if names:
      self._patient(lambda: self._store.delete(names))

  def _at(self, name: str) -> str:
    return f'{self._prefix}/{name}' if name else self._prefix

  def _each(self, function: Callable[[str], None], names: Iterable[str], patient: bool) -> None:
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix='bucket') as pool:
      for done in [pool.submit(self._patient, lambda n=n: function(n), patient) for n in names]:
        done.result()

  def _patient(self, function: Callable[[], Any], patient: bool = True) -> Any:
    start, pause = time.monotonic(), 0.5
    while True:
      try:
        return function()
      except (Conflict, FileNotFoundError):  # the latter: on this side
        raise
      except Exception as error:
        reason = self._store.reason(error)
        if reason is not None:
          raise UserError(f'{self.address}: {reason}') from error
        told = ' '.join(str(error).split())[:200] or type(error).__name__
        left = PATIENCE - (time.monotonic() - start)
        if not patient or left <= 0:
          waited = f' for {PATIENCE:.0f} seconds' if patient else ''
          raise UserError(
            f'{self.address}: the server could not be reached{waited} ({told}); what is in the '
            'bucket is kept; start the same command again when it is back'
          ) from error
        if pause > 2:  # a hiccup is not worth a line
          _log.warning('%s: %s; trying again, for %.0f s more', self.address, told, left)
      time.sleep(min(left, pause * random.uniform(0.8, 1.2)))
      pause = min(2 * pause, _LONGEST_PAUSE)


def place(path: str | os.PathLike[str]) -> tuple[str, str]:
  """An address without slashes at its end, as what is before its last part, and that part."""
  head, _, tail = str(path).rstrip('/').rpartition('/')
  return head, tail
