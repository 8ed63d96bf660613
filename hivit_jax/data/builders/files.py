"""Files that data sets are made from, in zip files or folders."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hivit_jax.errors import UserError


class Files(Protocol):
  """Files below a root.

  Attributes:
    root: where they are, for messages.
    paths: of all, from the root.
  """

  root: Path
  paths: list[str]

  def size(self, path: str) -> int:
    """Bytes of a file."""
    ...

  def read(self, path: str) -> bytes:
    """What is in a file; safe in several threads."""
    ...


class Zip:
  """The members of a zip file."""

  def __init__(self, path: str | os.PathLike | None):
    self.root = Path(path or '').expanduser()
    try:
      self._file = zipfile.ZipFile(self.root)
    except FileNotFoundError:
      raise UserError(f'{self.root} does not exist') from None
    except (OSError, zipfile.BadZipFile) as error:
      raise UserError(
        f'{self.root} is damaged, truncated or no zip file ({error}); download it again'
      ) from None
    self._members = {info.filename: info for info in self._file.infolist()}
    self.paths = list(self._members)

  def size(self, path: str) -> int:
    return self._members[path].file_size

  def read(self, path: str) -> bytes:
    try:
      return self._file.read(path)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
      raise UserError(f'{self.root}: {path} is damaged ({error}); download it again') from error


class Folder:
  """The files in some folders below a root."""

  def __init__(self, path: str | os.PathLike | None, folders: Sequence[str], advice: str):
    """Lists the files.

    Args:
      path: the root.
      folders: below it.
      advice: what to do where one of them is missing.
    """
    self.root = Path(path or '').expanduser()
    missing = [self.root / name for name in folders if not (self.root / name).is_dir()]
    if missing:
      raise UserError(f'there is no folder {missing[0]}; {advice}')
    self.paths = [
      f'{folder}/{name}' for folder in folders for name in os.listdir(self.root / folder)
    ]

  def size(self, path: str) -> int:
    return os.stat(self.root / path).st_size

  def read(self, path: str) -> bytes:
    return (self.root / path).read_bytes()
