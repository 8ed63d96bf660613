"""The page of `tools.serve` and what it asks for, as a WSGI application.

Whatever comes in, the answer to a mistake is one line in JSON, `{"error": ...}`, with a status of
4xx. Only pages from here may ask: no other origin, and no foreign name of this machine, which a
site in the browser could have pointed here.
"""

import importlib.resources
import ipaddress
import json
import logging
import socket
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from werkzeug import exceptions
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from hivit_jax.data.builders.packages import package_file
from hivit_jax.data.decode import BrokenImage
from hivit_jax.errors import UserError
from hivit_jax.tools.playground import Playground

MAX_BYTES = 32 * 2**20  # of a request
EXAMPLES = ('chelsea.png', 'coffee.png', 'astronaut.png', 'rocket.jpg')  # of scikit-image
_TYPES = {
  'css': 'text/css',
  'html': 'text/html',
  'jpg': 'image/jpeg',
  'js': 'text/javascript',
  'png': 'image/png',
}
_FILES = {'/': 'index.html', '/page.css': 'page.css', '/page.js': 'page.js'}
_SECONDS = 30  # without a byte from a client, then the connection is closed
_HEADERS = {
  'Content-Security-Policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  'Cross-Origin-Resource-Policy': 'same-origin',
  'Referrer-Policy': 'no-referrer',
  'X-Content-Type-Options': 'nosniff',
  'Cache-Control': 'no-store',
}

_log = logging.getLogger(__name__)


class _Request(Request):
  max_content_length = MAX_BYTES
  max_form_memory_size = 100_000  # of all fields that are no files
  max_form_parts = 10


class Pages:
  """The application.

  Args:
    playground: what answers.
    host: name or address that the server listens on.
  """

  def __init__(self, playground: Playground, host: str):
    self._playground = playground
    self._names = {'localhost', host.lower(), socket.gethostname().lower(), socket.getfqdn()}
    self._routes: dict[tuple[str, str], Callable[[Request], Response]] = {
      ('POST', '/look'): self._look,
      ('POST', '/reconstruct'): self._reconstruct,
      ('GET', '/about'): self._about,
    }
    page = importlib.resources.files('hivit_jax.tools') / 'page'
    for path, name in _FILES.items():
      self._routes['GET', path] = _file(name, (page / name).read_bytes())
    for i, name in enumerate(EXAMPLES):
      data = package_file('skimage', f'data/{name}').read_bytes()
      self._routes['GET', f'/examples/{i}'] = _file(name, data)

  def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
    with _Request(environ) as request:  # closes the files in it
      response = self._answer(request)
    response.headers.update(_HEADERS)
    return response(environ, start_response)

  def _answer(self, request: Request) -> Response:
    try:
      self._check_sender(request)
      return self._route(request)(request)
    except exceptions.RequestEntityTooLarge:
      return _error(413, f'the picture has more than {MAX_BYTES >> 20} MB')
    except exceptions.HTTPException as error:
      return _error(error.code or 500, error.description or error.name)
    except BrokenImage as error:
      return _error(415, f'cannot read the picture: {error}')
    except UserError as error:
      return _error(400, str(error))
    except OSError as error:
      return _error(400, f'the request broke off: {error}')
    except Exception:  # a bug; the server goes on
      _log.exception('%s %s', request.method, request.path)
      return _error(500, 'this failed; the terminal of the server says why')

  def _check_sender(self, request: Request) -> None:
    host = request.headers.get('Host', '')
    name = _name(f'//{host}')
    if name not in self._names and not _is_address(name):
      raise exceptions.Forbidden(f'this server is not {name or "without a name"}')
    origin = request.headers.get('Origin')
    if origin is not None and urllib.parse.urlsplit(origin).netloc != host:
      raise exceptions.Forbidden(f'pages of {origin} may not ask this server')

  def _route(self, request: Request) -> Callable[[Request], Response]:
    method = 'GET' if request.method == 'HEAD' else request.method
    found = self._routes.get((method, request.path))
    if found is not None:
      return found
    if any(path == request.path for _, path in self._routes):
      raise exceptions.MethodNotAllowed(description=f'{request.path} does not take {method}')
    raise exceptions.NotFound(f'there is no {request.path}')

  def _about(self, request: Request) -> Response:
    del request
    about = self._playground.about()
    return _json(about | {'examples': len(EXAMPLES), 'max_bytes': MAX_BYTES})

  def _look(self, request: Request) -> Response:
    return _json(self._playground.look(_picture(request)))

  def _reconstruct(self, request: Request) -> Response:
    data, form = _picture(request), request.form
    return _json(
      self._playground.reconstruct(
        data,
        mask=form.get('mask'),
        ratio=_number(form, 'ratio', float, None),
        seed=_number(form, 'seed', int, 0),
      )
    )


def server(pages: Pages, listening: socket.socket) -> BaseWSGIServer:
  """Answers requests in threads, `serve_forever()`, until `shutdown()` or Ctrl-C.

  Args:
    pages: the application.
    listening: where requests come in.
  """
  host, port = listening.getsockname()[:2]
  return make_server(
    host, port, pages, threaded=True, request_handler=_Handler, fd=listening.fileno()
  )


class _Handler(WSGIRequestHandler):
  timeout = _SECONDS

  def log(self, type: str, message: str, *args: Any) -> None:
    _log.log(logging.WARNING if type == 'error' else logging.DEBUG, message, *args)


def _name(url: str) -> str:
  try:
    return urllib.parse.urlsplit(url).hostname or ''
  except ValueError:
    return ''


def _is_address(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True


def _picture(request: Request) -> bytes:
  file = request.files.get('picture')
  if file is None:
    raise UserError('picture: expected a file in a form (multipart/form-data)')
  return file.read()


def _number(form: Any, key: str, kind: type, default: Any) -> Any:
  text = form.get(key)
  try:
    number = default if text is None else kind(text)
  except ValueError:
    number = -1
  if number is not None and not 0 <= number < 2**63:
    raise UserError(f'{key}={str(text)[:20]}: expected a number of at least 0')
  return number


def _file(name: str, data: bytes) -> Callable[[Request], Response]:
  kind = _TYPES[name.rpartition('.')[2]]  # not `mimetypes`, which this machine may have changed
  return lambda request: Response(data, mimetype=kind)


def _json(value: Any, status: int = 200) -> Response:
  return Response(json.dumps(value), status, mimetype='application/json')


def _error(status: int, line: str) -> Response:
  return _json({'error': ' '.join(line.split())}, status)
