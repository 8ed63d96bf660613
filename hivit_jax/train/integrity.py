"""Checksums of a checkpoint's files: a flipped bit is detected before anything is loaded.

Why our own: OCDBT guards its index with CRC-32C but not the array data, where a flipped bit would
be loaded silently; and an Orbax read that fails half-way reports it once for every array.
"""

import hashlib
import logging
import os
import pathlib
import re
import shutil

from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)
SUMS_FILE = 'SHA256SUMS'


class Damaged(Exception):
  """The files of a checkpoint differ from what was written; the message says how."""


def _files(path: pathlib.Path) -> list[str]:
  """The files of a checkpoint, except the list of sums, relative to it."""
  files = (file.relative_to(path).as_posix() for file in path.rglob('*') if file.is_file())
  return sorted(file for file in files if file != SUMS_FILE)


def write_sums(path: pathlib.Path) -> None:
  """Writes `SHA256SUMS` in the format of the sha256sum program; all is on the disk afterwards."""
  lines = []
  for name in _files(path):
    with open(path / name, 'rb') as file:
      lines.append(f'{hashlib.file_digest(file, "sha256").hexdigest()}  {name}\n')
      os.fsync(file.fileno())
  with open(path / SUMS_FILE, 'w') as file:
    file.writelines(lines)
    file.flush()
    os.fsync(file.fileno())
  sync(path)


def sync(directory: pathlib.Path) -> None:
  """Makes the names in a directory survive a power failure."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def verify(path: pathlib.Path, names: list[str] | None) -> None:
  """Raises Damaged unless the named files (None: all, and no others) are as they were written."""
  name = SUMS_FILE
  try:
    text = (path / SUMS_FILE).read_bytes().decode(errors='replace')
    sums = {name: digest for digest, name in re.findall(r'^([0-9a-f]{64})  (.+)\n', text, re.M)}
    if text != ''.join(f'{digest}  {name}\n' for name, digest in sums.items()):
      raise Damaged(f'{SUMS_FILE} was altered: it is malformed')
    if names is None:
      names = sorted({*_files(path), *sums})
    for name in names:
      if name not in sums:
        raise Damaged(f'{name} is not listed in {SUMS_FILE}')
      with open(path / name, 'rb') as file:
        if hashlib.file_digest(file, 'sha256').hexdigest() != sums[name]:
          raise Damaged(f'{name} was altered: it does not match {SUMS_FILE}')
  except PermissionError as error:
    raise UserError(f'cannot read {error.filename}: {error.strerror}') from error
  except FileNotFoundError as error:
    raise Damaged(f'{os.path.relpath(error.filename, path)} is missing') from error
  except OSError as error:  # an unreadable sector
    raise Damaged(f'{name}: {error.strerror}') from error


def set_aside(path: pathlib.Path) -> None:
  """Moves a damaged checkpoint to `<step>.damaged`, or says that this did not work."""
  aside = path.with_name(f'{path.name}.damaged')
  try:
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
  except OSError as error:
    _log.warning('could not move the damaged checkpoint %s: %s', path, error)
  else:
    _log.warning('moved the damaged checkpoint of step %s to %s', path.name, aside)
