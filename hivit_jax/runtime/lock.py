"""One run at a time in a workdir."""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of a workdir in this block.

  The lock is the kernel's (flock of `workdir/lock`), which takes it back however the process ends;
  child processes do not inherit it. The file stays. While the lock is held, and after a kill, it
  says by whom; else it is empty.

  Args:
    workdir: created if needed.

  Raises:
    UserError: another process holds the lock, or the file cannot be written.
  """
  path = workdir / 'lock'
  try:
    with contextlib.suppress(FileExistsError):  # if it is a file, `open` says so more clearly
      workdir.mkdir(parents=True)
    file = open(path, 'ab', buffering=0)  # noqa: SIM115
  except OSError as error:
    raise UserError(
      f'cannot write to {workdir}: {error.strerror}; choose another --workdir'
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'{workdir} is in use by another run, {path.read_text() or "just starting"}; '
        'wait until it ends, stop it, or choose another --workdir'
      ) from None
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
      _log.warning(
        '%s: its file system has no locks (%s); make sure that no other run is started there',
        path, error.strerror,
      )  # fmt: skip
    since = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
    file.truncate(0)
    with contextlib.suppress(OSError):  # a full disk matters to those who have to write there
      file.write(f'process {os.getpid()} on {socket.gethostname()} since {since}'.encode())
    try:
      yield
    finally:
      file.truncate(0)
