"""Servers on this machine that speak as Amazon S3 and Google Cloud Storage do.

S3 is moto's server; Google's is gcp-storage-emulator, to which conditional writes are added here:
it ignores `ifGenerationMatch`. Both keep objects in memory, also while they are stopped.
"""

import contextlib
import io
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from unittest import mock

BUCKET = 'bucket'
_CREDENTIALS = {
  'AWS_ACCESS_KEY_ID': 'tests',
  'AWS_SECRET_ACCESS_KEY': 'tests',
  'AWS_DEFAULT_REGION': 'us-east-1',
  'AWS_EC2_METADATA_DISABLED': 'true',
}


class Server:
  """A server that can be stopped and started again, with the same objects.

  Attributes:
    scheme: 's3' or 'gs'.
    environment: of processes that shall use it.
    before: called before each request, with its method and its path, query and name of what is
      uploaded included; may raise or wait, or return a status with which the request is refused.
  """

  def __init__(self, scheme: str):
    self.scheme = scheme
    self.before: Callable[[str, str], HTTPStatus | None] | None = None
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      self._port = free.getsockname()[1]
    self.url = f'http://127.0.0.1:{self._port}'
    self._serve = _s3_app() if scheme == 's3' else _gcs_handler(self)
    self._server = None
    self.start()

  @property
  def environment(self) -> Mapping[str, str]:
    if self.scheme == 'gs':
      return {'STORAGE_EMULATOR_HOST': self.url}
    return _CREDENTIALS | {'AWS_ENDPOINT_URL_S3': self.url}

  def address(self, path: str) -> str:
    return f'{self.scheme}://{BUCKET}/{path}'

  def start(self) -> None:
    if self.scheme == 's3':
      from werkzeug.serving import make_server

      self._server = make_server('127.0.0.1', self._port, self._app, threaded=True)
    else:
      import http.server

      self._server = http.server.ThreadingHTTPServer(('127.0.0.1', self._port), self._serve)
    self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Refuses connections from now on."""
    if self._server is not None:
      self._server.shutdown()
      self._server.server_close()
      self._thread.join()
      self._server = None

  def _app(self, environ, answer):
    path = f'{environ["PATH_INFO"]}?{environ["QUERY_STRING"]}'
    refused = self.before and self.before(environ['REQUEST_METHOD'], path)
    if refused:
      answer(f'{refused.value} {refused.phrase}', [('Content-Type', 'application/xml')])
      return [f'<Error><Code>AccessDenied</Code><Message>{refused}</Message></Error>'.encode()]
    return self._serve(environ, answer)


def _s3_app():
  from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  return DomainDispatcherApplication(create_backend_app)


def _gcs_handler(server: Server):
  from gcp_storage_emulator import server as emulator
  from gcp_storage_emulator.storage import Storage

  storage, writing = Storage(use_memory_fs=True), threading.Lock()

  class Handler(emulator.RequestHandler):
    def __init__(self, *args):
      super().__init__(storage, *args)

    def log_message(self, format, *args):
      pass

    def _route(self, method: str) -> None:
      connection, body = self.rfile, self.rfile.read(int(self.headers.get('Content-Length', 0)))
      named = re.search(rb'"name": "([^"]+)"', body[:1000])  # not in the path
      path = f'{self.path}&name={named[1].decode()}' if named else self.path
      refused = server.before and server.before(method, path)
      if refused:
        return self.send_error(refused.value)
      self.rfile = io.BytesIO(body)
      try:
        with writing:
          emulator.Router(self).handle(method)
      finally:
        self.rfile = connection

    def do_GET(self):
      self._route('GET')

    def do_POST(self):
      self._route('POST')

    def do_PUT(self):
      self._route('PUT')

    def do_DELETE(self):
      self._route('DELETE')

  return Handler


def _conditional(insert):
  """`ifGenerationMatch` of uploads: 0 stands for no object."""

  def checked(request, response, storage, *args, **kwargs):
    wanted = request.query.get('ifGenerationMatch')
    if wanted:
      name = request.query['name'][0] if 'name' in request.query else request.data['meta']['name']
      there = storage.objects.get(request.params['bucket_name'], {}).get(name)
      if wanted[0] != (there['generation'] if there else '0'):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return None
    return insert(request, response, storage, *args, **kwargs)

  return checked


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[Server]:
  """Runs a server with one bucket, to which this process and its children are sent."""
  with contextlib.ExitStack() as stack:
    if scheme == 'gs':
      from gcp_storage_emulator import server as emulator
      from gcp_storage_emulator.handlers import objects

      logging.getLogger('api').setLevel(logging.CRITICAL)
      checked = _conditional(objects.insert)
      stack.enter_context(mock.patch.object(objects, 'insert', checked))
      routes = tuple(
        (path, {m: checked if h is _plain(checked) else h for m, h in methods.items()})
        for path, methods in emulator.HANDLERS
      )
      stack.enter_context(mock.patch.object(emulator, 'HANDLERS', routes))
    server = Server(scheme)
    stack.callback(server.stop)
    stack.enter_context(mock.patch.dict(os.environ, server.environment))
    _make_bucket(scheme)
    yield server


def _plain(checked):
  return checked.__closure__[0].cell_contents


def _make_bucket(scheme: str) -> None:
  if scheme == 's3':
    import boto3

    boto3.client('s3').create_bucket(Bucket=BUCKET)
  else:
    from google.cloud import storage

    storage.Client(project='tests').create_bucket(BUCKET)
