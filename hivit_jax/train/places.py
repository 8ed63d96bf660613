"""Where a run keeps its files: a directory, or a bucket behind a directory of its own.

In a bucket, process 0 works in a temporary directory, which `Mirror` copies, and each checkpoint is
copied when it is complete there: `SHA256SUMS`, which lists all its other files, last. Without that
object there is no checkpoint. Other processes send process 0 what is to be saved, and get from it
what was restored.

So that everything else can work as on a disk, the temporary directory has for each checkpoint of
the bucket a directory with its sums and its record; `complete` fetches the rest.
"""

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Collection

from hivit_jax.buckets import bucket, lease
from hivit_jax.buckets.bucket import Bucket, is_address
from hivit_jax.buckets.mirror import Mirror
from hivit_jax.buckets.stores import Conflict
from hivit_jax.errors import UserError
from hivit_jax.runtime import distributed, lock
from hivit_jax.train import integrity, manifest

_log = logging.getLogger(__name__)
_CHECKPOINTS = 'checkpoints'
_SUMS, _ASIDE = integrity.SUMS_FILE, f'{integrity.SUMS_FILE}.damaged'
_STUB = (_SUMS, manifest.FILE)


class Disk:
  """A directory that all processes see.

  Attributes:
    directory: of the run.
    shared: every process writes its part of a checkpoint.
  """

  shared = True

  def __init__(self, directory: str | os.PathLike[str]):
    self.directory = pathlib.Path(directory).expanduser().absolute()

  def open(self, stack: contextlib.ExitStack) -> None:
    """Keeps other runs out until the stack closes."""
    distributed.on_primary(lambda: stack.enter_context(lock.hold(self.directory)))

  def shown(self, path: pathlib.Path) -> pathlib.Path | str:
    """What messages call the directory, or something in it."""
    return path

  def make(self, path: pathlib.Path) -> None:
    """Creates a directory in it."""
    path.mkdir(parents=True, exist_ok=True)

  def removal(self, path: pathlib.Path) -> str:
    """A command that removes a checkpoint."""
    return f'rm -r {path}'

  def read(self, path: pathlib.Path) -> manifest.Record:
    """The record of a checkpoint that is all on the disk afterwards, verified; `Damaged`."""
    return manifest.read_verified(path)

  def push(self) -> None:
    """Copies what the run has written, checkpoints aside, to where it stays; UserError."""

  def publish(self, path: pathlib.Path, step: int) -> None:
    """Makes a checkpoint, all on the disk, one that the next start finds."""

  def strip(self, path: pathlib.Path) -> None:
    """Removes, of a checkpoint on the disk, what can be had again."""

  def remove(self, path: pathlib.Path) -> None:
    """Removes a checkpoint; OSError or UserError."""
    shutil.rmtree(path)

  def set_aside(self, path: pathlib.Path) -> None:
    """Moves a damaged checkpoint to where it is not in the way."""
    integrity.set_aside(path)


class Remote(Disk):
  """A place in a bucket; only process 0 talks to its server."""

  shared = False

  def __init__(self, address: str):
    """UserError if the address or its package are not there."""
    self._bucket = Bucket(address)
    self.directory = pathlib.Path(tempfile.gettempdir())
    self._lease = lease.Lease(self._bucket)
    self._mirror: Mirror | None = None

  def open(self, stack: contextlib.ExitStack) -> None:
    self.directory = pathlib.Path(distributed.on_primary(lambda: self._open(stack)))

  def _open(self, stack: contextlib.ExitStack) -> str:
    stack.enter_context(self._lease)
    self.directory = _scratch(self._bucket.address)
    stack.push(self._end)
    left_out = (_CHECKPOINTS, lease.NAME)
    mirror = Mirror(self._bucket, self.directory, left_out, self._lease.check)
    self._mirror = stack.enter_context(mirror)
    _fetch_stubs(self._bucket, self.directory, clean=True)
    return str(self.directory)

  def _end(self, kind, error, trace) -> bool:
    """Removes the temporary directory, unless it has what could not be copied."""
    if self._mirror is None or self._mirror.done:
      shutil.rmtree(self.directory.parent, ignore_errors=True)
    else:
      _log.warning('what is not in %s is in %s', self._bucket.address, self.directory)
    return False

  def shown(self, path: pathlib.Path) -> str:
    return '/'.join((self._bucket.address, *path.relative_to(self.directory).parts))

  def make(self, path: pathlib.Path) -> None:
    if distributed.primary():
      super().make(path)

  def removal(self, path: pathlib.Path) -> str:
    google = self._bucket.address.startswith('gs:')
    return f'{"gcloud storage rm -r" if google else "aws s3 rm --recursive"} {self.shown(path)}'

  def read(self, path: pathlib.Path) -> manifest.Record:
    return _complete(self._bucket, path)

  def push(self) -> None:
    if self._mirror is not None:
      self._mirror.push()

  def publish(self, path: pathlib.Path, step: int) -> None:
    self.push()  # metrics first: a checkpoint's rows are there when it is
    self._lease.check()
    below = _below(step)
    self._bucket.delete(self._bucket.sizes(below))
    files = {below + file.relative_to(path).as_posix(): file for file in _files(path)}
    sums = files.pop(below + _SUMS)
    self._bucket.upload(files)
    if self._bucket.sizes(below) != {name: file.stat().st_size for name, file in files.items()}:
      raise UserError('there are other files than were written; does another run write there?')
    self._lease.check()
    try:
      self._bucket.write(below + _SUMS, sums.read_bytes(), expected='')
    except Conflict as error:
      found = self._bucket.read(below + _SUMS)
      if found is None or found.content != sums.read_bytes():  # else the answer to us was lost
        raise UserError('another run has written it') from error

  def strip(self, path: pathlib.Path) -> None:
    # Another process of this machine sees the same files, and must not race for them.
    for file in _files(path) if distributed.primary() else ():
      if file.relative_to(path).as_posix() not in _STUB:
        file.unlink()

  def remove(self, path: pathlib.Path) -> None:
    _remove(self._bucket, int(path.name))
    super().remove(path)

  def set_aside(self, path: pathlib.Path) -> None:
    below = _below(int(path.name))
    found = self._bucket.read(below + _SUMS)
    if found is not None:
      self._bucket.write(below + _ASIDE, found.content)
      self._bucket.delete([below + _SUMS])
    shutil.rmtree(path, ignore_errors=True)
    _log.warning(
      'set the damaged checkpoint %s aside: its %s is now %s', self.shown(path), _SUMS, _ASIDE
    )


def of(workdir: str) -> Disk:
  """The place that `--workdir` names."""
  return Remote(workdir) if is_address(workdir) else Disk(workdir)


def local(path: str | os.PathLike[str], step: int | None = None) -> str | os.PathLike[str]:
  """A path in the file system for one that may be in a bucket; what it names is fetched to there.

  Args:
    path: of a file, a workdir, its `best`, one of its checkpoints, or a directory of
      `save_pretrained`; not in a bucket: it is returned.
    step: of a workdir: fetch this checkpoint instead of the newest usable one.

  Raises:
    UserError: there is nothing of the kind, or the bucket cannot be read.
  """
  if not is_address(path):
    return path
  path = str(path).rstrip('/')
  above, name = bucket.place(path)
  if name == 'best' or name == _CHECKPOINTS:
    root, inside = above, (name,)
  elif name.isdecimal() and bucket.place(above)[1] == _CHECKPOINTS:
    root, inside = bucket.place(above)[0], (_CHECKPOINTS, name)
  else:
    root, inside = path, ()
  place = Bucket(root)
  directory = _cache() / hashlib.sha256(root.encode()).hexdigest()[:12] / bucket.place(root)[1]
  sizes = place.sizes()
  if not sizes and place.is_object():
    place.download({'': directory})
    return directory
  if not sizes:
    raise UserError(f'{path} does not exist: there is nothing in the bucket below {root}')
  names = [name for name in sizes if '/' not in name and name != lease.NAME]
  place.download({name: directory / name for name in names})
  if any(name.startswith(f'{_CHECKPOINTS}/') for name in sizes):
    _fetch_stubs(place, directory, clean=False)
    found = directory.joinpath(*inside)
    try:
      checkpoints, chosen = manifest.locate(found, step)
      manifest.newest_usable(checkpoints, chosen, functools.partial(_complete, place))
    except UserError as error:
      raise UserError(str(error).replace(str(directory), root)) from error
  return directory.joinpath(*inside)


@functools.cache
def _cache() -> pathlib.Path:
  """A directory as long as this process."""
  path = pathlib.Path(tempfile.mkdtemp(prefix='hivit_jax-read-'))
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  return path


def _scratch(address: str) -> pathlib.Path:
  """A new directory for a run; those that killed runs at this address have left are removed."""
  prefix = f'hivit_jax-{hashlib.sha256(address.encode()).hexdigest()[:12]}-'
  for left in pathlib.Path(tempfile.gettempdir()).glob(f'{prefix}*'):
    shutil.rmtree(left, ignore_errors=True)
  path = pathlib.Path(tempfile.mkdtemp(prefix=prefix)) / bucket.place(address)[1]
  path.mkdir()  # trackers call a run by this name
  return path


def _below(step: int) -> str:
  return f'{_CHECKPOINTS}/{step}/'


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  return [file for file in path.rglob('*') if file.is_file()]


def _remove(place: Bucket, step: int) -> None:
  below = _below(step)
  place.delete([below + _SUMS])  # from here on it is no checkpoint
  place.delete(place.sizes(below))


def _complete(place: Bucket, path: pathlib.Path) -> manifest.Record:
  """Fetches what is missing of a checkpoint, and verifies it."""
  below = _below(int(path.name))
  missing = {
    name: file
    for name in place.sizes(below)
    if not (file := path / name.removeprefix(below)).is_file()
  }
  place.download(missing)
  return manifest.read_verified(path)


def _fetch_stubs(place: Bucket, directory: pathlib.Path, *, clean: bool) -> None:
  """Makes a directory for each checkpoint in a bucket; removes there what is none, if `clean`."""
  objects: dict[int, set[str]] = {}
  for name in place.sizes(f'{_CHECKPOINTS}/'):
    step, _, file = name.removeprefix(f'{_CHECKPOINTS}/').partition('/')
    if step.isdecimal():
      objects.setdefault(int(step), set()).add(file)
  stubs = {}
  for step, files in objects.items():
    path = directory / _CHECKPOINTS / str(step)
    if _SUMS in files:
      _forget_other(place, path)
      (path / 'state').mkdir(parents=True, exist_ok=True)  # by which `locate` knows a checkpoint
      stubs |= {_below(step) + f: path / f for f in _missing(path, files)}
    elif clean and _ASIDE not in files:
      _remove(place, step)
      _log.info('removed the incomplete checkpoint %s/%s', place.address, _below(step))
  place.download(stubs)


def _missing(path: pathlib.Path, files: Collection[str]) -> list[str]:
  return [name for name in _STUB if name in files and not (path / name).exists()]


def _forget_other(place: Bucket, path: pathlib.Path) -> None:
  """Removes what was fetched earlier of another checkpoint of the same step."""
  if path.exists():
    found = place.read(_below(int(path.name)) + _SUMS)
    if found is None or found.content != (path / _SUMS).read_bytes():
      shutil.rmtree(path)
