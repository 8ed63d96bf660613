"""One run at a time in a workdir: the lock by itself. Whole runs are in tests/test_faults.py."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys

import pytest

from hivit_jax.errors import UserError
from hivit_jax.runtime import lock


def test_a_lock_that_is_held_names_its_holder_and_is_free_afterwards(tmp_path):
  workdir = tmp_path / 'new' / 'run'
  with lock.hold(workdir):
    with pytest.raises(UserError) as refused, lock.hold(workdir):
      pass
    message = (
      rf'{workdir} is in use by another run, process {os.getpid()} on {socket.gethostname()} since '
      r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d; wait until it ends, stop it, or choose '
      r'another --workdir'
    )
    assert re.fullmatch(message, str(refused.value))
  assert (workdir / 'lock').read_bytes() == b''
  with lock.hold(workdir):
    pass


def test_a_child_process_does_not_keep_the_lock(tmp_path):
  with lock.hold(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
  try:
    with lock.hold(tmp_path):
      assert child.poll() is None
  finally:
    child.communicate()


def test_the_name_that_a_kill_left_behind_is_replaced(tmp_path):
  (tmp_path / 'lock').write_text('process 1 on another-host-with-a-long-name since 1999-12-31' * 9)
  with lock.hold(tmp_path):
    assert (tmp_path / 'lock').read_text().startswith(f'process {os.getpid()} on ')
    assert 'another-host' not in (tmp_path / 'lock').read_text()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
  def refuse(file, operation):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  with lock.hold(tmp_path), lock.hold(tmp_path):
    assert [r.levelname for r in caplog.records] == ['WARNING'] * 2
    assert f'{tmp_path}/lock: its file system has no locks (No locks avail' in caplog.messages[0]
