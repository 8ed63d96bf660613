"""The processes of a job watch each other: none waits forever for one that has ended.

JAX itself notices when a process has been silent for 100 seconds, and then ends all the others
with a stack dump. Here process 0 has a connection to every other one, which the kernel closes at
the moment a process ends in whatever way, and within a minute if its host is gone. Where no
connection can be made, JAX's way is left.

Process 0 has the service through which JAX connects the others: it ends last, or JAX would be
faster than we are.
"""

import contextlib
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time

import jax

from hivit_jax.errors import Stopped, UserError
from hivit_jax.runtime import distributed

_log = logging.getLogger(__name__)
# What one tells the others: a failure, which they may be about to report themselves, or the end.
_DONE, _FAILED, _END = b'done', b'failed ', b'end '
_HELLO = b'ok\n'
_AGAIN = 'The same command, started again in all processes, continues from the last checkpoint'
_CONNECT_SECONDS = 10.0
_GRACE_SECONDS = 5.0  # for a process to say itself what went wrong
_LAST_SECONDS = 5.0  # that process 0 waits for the others to end
# Seconds of silence until the kernel asks, between its questions, and how many.
_KEEPALIVE = (('TCP_KEEPIDLE', 20), ('TCP_KEEPINTVL', 10), ('TCP_KEEPCNT', 4))


class Watch:
  """Inside this context, the end of one process of the job ends all of them.

  One that ends by an exception tells the others why; they end with that message if they have not
  failed, too, within some seconds. One that vanishes ends them at once. Exit status: 143, for which
  job schedulers start a job again, or that of the process that failed.

  Every process must enter it; with one process it does nothing.
  """

  def __enter__(self) -> 'Watch':
    self._leaving = threading.Event()
    self._connections: dict[socket.socket, str] = {}
    self._open: set[socket.socket] = set()  # of those that have not ended
    self._ending = threading.Lock()
    if jax.process_count() > 1:
      self._connect()
      self._open = set(self._connections)
      threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if jax.process_count() == 1:
      return
    if isinstance(error, Exception) and not isinstance(error, UserError | Stopped):
      # A lost process may be its reason, and then the thread ends this one with that message.
      time.sleep(_GRACE_SECONDS)
    self._leaving.set()
    if error is None:
      self._tell(_DONE)
      return
    status = _status(error)
    self._tell(_FAILED + f'{status} {distributed.first_line(error)}'.encode())
    self._wait_for_others(_GRACE_SECONDS + _LAST_SECONDS)
    # At its end Python would wait for the other processes, which wait for this one.
    end = threading.Timer(_GRACE_SECONDS, os._exit, (status,))
    end.daemon = True
    end.start()

  def _connect(self) -> None:
    server = None
    port = 0
    if distributed.primary():
      with contextlib.suppress(OSError):
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(('', 0), family=family, backlog=1024, dualstack_ipv6=dual)
        port = server.getsockname()[1]
    own = [_own_addresses(), port, secrets.token_hex(16)]
    hosts, port, token = distributed.on_primary(lambda: own)
    if not distributed.primary():
      connection = _first_connection(hosts, port, token) if port else None
      if connection is None:
        _log.warning('no connection to process 0 at %s, port %d', ' or '.join(hosts), port)
      else:
        self._connections[connection] = 'process 0'
    elif server is not None:
      with server:
        self._accept(server, token)

  def _accept(self, server: socket.socket, token: str) -> None:
    others = jax.process_count() - 1
    deadline = time.monotonic() + _CONNECT_SECONDS
    while len(self._connections) < others and time.monotonic() < deadline:
      server.settimeout(max(0.01, deadline - time.monotonic()))
      with contextlib.suppress(OSError):
        connection, _ = server.accept()
        connection.settimeout(1.0)
        words = _read_line(connection).split()
        if len(words) != 3 or words[0] != token:
          connection.close()  # of somebody else
          continue
        connection.sendall(_HELLO)
        _keep_alive(connection)
        self._connections[connection] = f'process {words[1]} on {words[2]}'
    if len(self._connections) < others:
      _log.warning(
        '%d of %d processes are not watched: if one ends, the others notice after 100 seconds',
        others - len(self._connections), others + 1,
      )  # fmt: skip

  def _watch(self) -> None:
    selector = selectors.DefaultSelector()
    for connection in self._connections:
      selector.register(connection, selectors.EVENT_READ)
    while selector.get_map():
      for key, _ in selector.select():
        connection = key.fileobj
        assert isinstance(connection, socket.socket)
        try:
          said = connection.recv(4096)
        except OSError:
          said = b''
        if not said or said == _DONE:
          selector.unregister(connection)
          self._open.discard(connection)
        if said != _DONE and not self._leaving.is_set():
          # In a thread of its own: this one goes on to see the others end. None when this process
          # ends on its own: Python 3.12 starts no thread while it shuts down.
          arguments = self._connections[connection], said
          threading.Thread(target=self._end, args=arguments, daemon=True).start()

  def _end(self, peer: str, said: bytes) -> None:
    status, message, again = 143, '', f'. {_AGAIN}'
    if not said:
      message = f'{peer} ended without a message (killed? out of memory? host gone?)'
    else:
      kind, code, message = said.decode(errors='replace').split(' ', 2)
      status = int(code)
      again = again if status == 143 else ''
      if kind == 'failed':
        message = f'{peer} failed: {message}'
    with self._ending:
      if self._leaving.wait(_GRACE_SECONDS if said.startswith(_FAILED) else 0):
        return
      self._tell(_END + f'{status} {message}'.encode())
      own = f'process {jax.process_index()} of {jax.process_count()}'
      print(f'{own} stops: {message}{again}', file=sys.stderr, flush=True)
      self._wait_for_others(_LAST_SECONDS)
      os._exit(status)

  def _tell(self, message: bytes) -> None:
    for connection in self._connections:
      with contextlib.suppress(OSError):
        connection.sendall(message)

  def _wait_for_others(self, seconds: float) -> None:
    """In process 0, until the others have closed their connections."""
    deadline = time.monotonic() + seconds
    while distributed.primary() and self._open and time.monotonic() < deadline:
      time.sleep(0.02)


def _status(error: BaseException) -> int:
  if isinstance(error, Stopped):
    return 143
  return 2 if isinstance(error, UserError) else 1


def _read_line(connection: socket.socket) -> str:
  line = b''
  while not line.endswith(b'\n') and len(line) < 1000 and (byte := connection.recv(1)):
    line += byte
  return line.decode(errors='replace')


def _keep_alive(connection: socket.socket) -> None:
  connection.settimeout(None)
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in _KEEPALIVE:
    if hasattr(socket, name):  # on Linux
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _own_addresses() -> list[str]:
  """The likeliest first: how the others were told to find process 0."""
  name = socket.gethostname()
  found = [distributed.coordinator_host, name]
  with contextlib.suppress(OSError):
    found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
  found = [host for host in dict.fromkeys(found) if host]
  return sorted(found, key=lambda host: host.startswith('127.') and host != found[0])


def _first_connection(hosts: list[str], port: int, token: str) -> socket.socket | None:
  for host in hosts:
    with contextlib.suppress(OSError):
      connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS / len(hosts))
      connection.sendall(f'{token} {jax.process_index()} {socket.gethostname()}\n'.encode())
      connection.settimeout(_CONNECT_SECONDS)
      if _read_line(connection).encode() == _HELLO:  # else process 0 has stopped listening
        _keep_alive(connection)
        return connection
      connection.close()
  return None
