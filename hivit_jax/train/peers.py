"""The processes of a job watch each other: none waits for ever for one that has ended.

JAX notices by itself when a process has been silent for 100 seconds, and then ends all the others
with a stack dump. Here process 0 has a connection to every other one, which the kernel closes at
the moment a process ends in whatever way. Where no connection can be made, JAX's way is left.
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
from hivit_jax.train import distributed

_log = logging.getLogger(__name__)
_DONE, _FAILED = b'done', b'failed '
_CONNECT_SECONDS = 10.0
_AGAIN = 'The same command, started again in all processes, continues from the last checkpoint'
_GRACE_SECONDS = 10.0  # for a process to say itself what went wrong


class Watch:
  """While it is entered, a process of the job that ends is the end of them all.

  One that ends by an exception tells the others why; they end with that message if they have not
  failed, too, within ten seconds. One that vanishes ends them at once. Exit status: 143, for which
  job schedulers start a job again; 2 after another process's `UserError`.

  Every process must enter it; with one process it does nothing.
  """

  def __enter__(self) -> 'Watch':
    self._leaving = threading.Event()
    self._connections: dict[socket.socket, str] = {}
    if jax.process_count() > 1:
      self._connect()
      self._thread = threading.Thread(target=self._watch, name='peers', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if jax.process_count() == 1:
      return
    self._leaving.set()
    lost = None
    if isinstance(error, jax.errors.JaxRuntimeError):
      error = lost = Stopped(
        f'process {jax.process_index()} of {jax.process_count()} lost another one '
        f'({distributed.first_line(error)}); why that one ended stands in its own output. {_AGAIN}'
      )
    message = _DONE
    if error is not None:
      message = _FAILED + f'{_status(error)} {distributed.first_line(error)}'.encode()
      # At its end Python would wait for the other processes, which wait for this one.
      end = threading.Timer(_GRACE_SECONDS, os._exit, (_status(error),))
      end.daemon = True
      end.start()
    self._tell(message)
    if lost is not None:
      raise lost

  def _connect(self) -> None:
    count = jax.process_count()
    server = None
    if distributed.primary():
      dual = socket.has_dualstack_ipv6()
      family = socket.AF_INET6 if dual else socket.AF_INET
      server = socket.create_server(('', 0), family=family, backlog=count, dualstack_ipv6=dual)
    token = secrets.token_hex(16)
    hosts, port, token = distributed.on_primary(
      lambda: [_own_addresses(), server.getsockname()[1] if server else 0, token]
    )
    if server is None:
      connection = _first_connection(hosts, port)
      if connection is None:
        _log.warning('no connection to process 0 at %s, port %d', ' or '.join(hosts), port)
      else:
        connection.sendall(f'{token} {jax.process_index()} {socket.gethostname()}\n'.encode())
        self._connections[connection] = 'process 0'
      return
    with server:
      deadline = time.monotonic() + _CONNECT_SECONDS
      while len(self._connections) < count - 1 and time.monotonic() < deadline:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        with contextlib.suppress(OSError, ValueError):
          connection, _ = server.accept()
          connection.settimeout(_CONNECT_SECONDS)
          words = _read_line(connection).split()
          connection.settimeout(None)
          if words[:1] == [token]:
            self._connections[connection] = f'process {words[1]} on {words[2]}'
    missing = count - 1 - len(self._connections)
    if missing:
      _log.warning(
        '%d of %d processes are not watched: should one end, the others notice after 100 seconds',
        missing, count,
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
        selector.unregister(connection)
        if said != _DONE and not self._leaving.is_set():
          self._end(self._connections[connection], said)

  def _end(self, peer: str, said: bytes) -> None:
    status, again = 143, _AGAIN
    if said.startswith(_FAILED):
      code, _, reason = said.removeprefix(_FAILED).decode(errors='replace').partition(' ')
      status, message = int(code), f'{peer} failed: {reason}'
      if self._leaving.wait(_GRACE_SECONDS):
        return
      again = _AGAIN if status == 143 else ''
    else:
      message = f'{peer} has ended without a word (killed? out of memory? host gone?)'
    self._tell(_FAILED + f'{status} {message}'.encode())
    own = f'process {jax.process_index()} of {jax.process_count()}'
    print(f'{own} stops: {message}. {again}', file=sys.stderr, flush=True)
    os._exit(status)

  def _tell(self, message: bytes) -> None:
    for connection in self._connections:
      with contextlib.suppress(OSError):
        connection.sendall(message)
        connection.shutdown(socket.SHUT_WR)


def _status(error: BaseException) -> int:
  if isinstance(error, Stopped):
    return 143
  return 2 if isinstance(error, UserError) else 1


def _read_line(connection: socket.socket) -> str:
  line = b''
  while not line.endswith(b'\n') and len(line) < 1000 and (byte := connection.recv(1)):
    line += byte
  return line.decode(errors='replace')


def _own_addresses() -> list[str]:
  name = socket.gethostname()
  found = [name]
  with contextlib.suppress(OSError):
    found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
  return list(dict.fromkeys(found))


def _first_connection(hosts: list[str], port: int) -> socket.socket | None:
  for host in hosts:
    with contextlib.suppress(OSError):
      connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS / len(hosts))
      connection.settimeout(None)
      return connection
  return None
