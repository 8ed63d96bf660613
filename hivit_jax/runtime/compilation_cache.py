"""Compiled programs are kept on disk, so that the next run need not compile them again.

JAX does it, see https://docs.jax.dev/en/latest/persistent_compilation_cache.html; this module says
where, how much, and what happens to a damaged file. JAX's own size limit is not used: every lookup
would take a lock, for which the processes of a job on a network disk would queue.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import re
from collections.abc import Iterator

import jax

_log = logging.getLogger(__name__)
_SIZE = 2**31  # bytes that are left when a run begins
_TROUBLE = re.compile(
  r"Error (reading|writing) persistent compilation cache entry for '(\w+)': (.*)"
)
_CPU = r'(?:vendor_id|cpu family|model|model name|stepping|flags|CPU \w+|Features)\s*:.*'


def turn_on() -> None:
  """Keeps what is compiled from now on below $XDG_CACHE_HOME/hivit_jax/xla; default: ~/.cache.

  JAX's settings win: with JAX_COMPILATION_CACHE_DIR programs are kept elsewhere and nothing here
  touches them, with JAX_ENABLE_COMPILATION_CACHE=false they are not kept. A directory that cannot
  be written is no error, but one log line.
  """
  if jax.config.values['jax_compilation_cache_dir'] is not None:
    return
  if not jax.config.values['jax_enable_compilation_cache']:
    return
  try:
    home = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    root = home / 'hivit_jax' / 'xla'
    directory = root / _cpu()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
      raise PermissionError(f'cannot write to {directory}')
    _make_room(root)
  except (OSError, RuntimeError) as error:  # the latter: there is no home
    _log.info('compiled programs are not kept for the next run: %s', error)
    return
  jax.config.update('jax_compilation_cache_dir', str(directory))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # A run compiles dozens of small programs before its first step.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  logging.getLogger('py.warnings').addFilter(_Repair(directory))


def _cpu(cpuinfo: pathlib.Path = pathlib.Path('/proc/cpuinfo')) -> str:
  """A name for this kind of CPU.

  Programs for one may crash on another, and JAX's key of a program does not tell them apart; home
  directories are shared by many.
  """
  try:
    first, *_ = cpuinfo.read_text().split('\n\n')
    told = '\n'.join(re.findall(_CPU, first))
  except OSError:  # not Linux
    told = platform.processor()
  kind = f'{platform.system()} {platform.machine()} {told}'
  return f'{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}'


def _make_room(root: pathlib.Path) -> None:
  """Deletes the files that were not used for longest, beyond `_SIZE`."""
  files = []
  for entry in _entries(root):
    with contextlib.suppress(FileNotFoundError):  # other runs do the same
      status = entry.stat()
      files.append((max(status.st_atime, status.st_mtime), status.st_size, entry.path))
  total = 0
  for _, size, path in sorted(files, reverse=True):
    total += size
    if total > _SIZE:
      pathlib.Path(path).unlink(missing_ok=True)


def _entries(directory: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
  """All files below a directory: for thousands of them `rglob` takes five times as long."""
  with os.scandir(directory) as entries:
    for entry in entries:
      if entry.is_dir(follow_symlinks=False):
        yield from _entries(entry.path)
      else:
        yield entry


class _Repair(logging.Filter):
  """Deletes the file that JAX warns of, which it would never write again, and says so in one line.

  JAX writes in place: a kill or a full disk leaves half a file. It then compiles, as without one.
  """

  def __init__(self, directory: pathlib.Path):
    super().__init__()
    self._directory = directory

  def filter(self, record: logging.LogRecord) -> bool:
    trouble = _TROUBLE.search(record.getMessage())
    if trouble:
      done, program, reason = trouble.groups()
      with contextlib.suppress(OSError):
        paths = sorted(self._directory.glob(f'{program}-*-cache'), key=os.path.getmtime)
        for path in paths if done == 'reading' else paths[-1:]:  # names do not tell which is read
          path.unlink(missing_ok=True)
      record.msg = 'a compiled program could not be %s %s: %s; the run continues'
      verb = 'read from' if done == 'reading' else 'written to'
      record.args = (verb, self._directory, reason.strip())
    return True
