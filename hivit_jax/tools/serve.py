"""A local page to play with a model.

  python -m hivit_jax.tools.serve (--workdir=WORKDIR | --weights=FILE) [--port=8000] [--ema]

Open the address that it prints. Drop a picture on the page, or take one of its own, and see

  of an autoencoder   what it reconstructs, from the units that you leave it
  of a classifier     the likeliest classes
  of a segmenter      the class of each pixel
  of a detector       objects with boxes and masks
  of all models       feature maps, the three principal components of each level as colours

Only this machine can open the page, unless --host names another of its addresses. Ctrl-C ends it.
"""

import ipaddress
import logging
import socket

from absl import flags

from hivit_jax import cli
from hivit_jax.errors import UserError
from hivit_jax.reporting.console import setup_logging
from hivit_jax.runtime import compilation_cache
from hivit_jax.tools import class_names, image_flags, playground_pages
from hivit_jax.tools.playground import Playground
from hivit_jax.train import weights

flags.adopt_module_key_flags(image_flags)
flags.adopt_module_key_flags(class_names)
_HOST = flags.DEFINE_string(
  'host', '127.0.0.1', 'Address to listen on; 0.0.0.0: all, for everyone who reaches this machine.'
)
_PORT = flags.DEFINE_integer(
  'port', 8000, 'Port to listen on; 0: any that is free.', lower_bound=0, upper_bound=65535
)

_log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
  source = image_flags.source()
  if argv[1:]:
    raise UserError(f'{argv[1]}: there is nothing to name; pictures are chosen on the page')
  setup_logging()
  compilation_cache.turn_on()
  with _listen() as listening:
    state = weights.read(source, ema=image_flags.EMA.value)
    playground = Playground(state, class_names.LABELS.value)
    playground.compile()
    host, port = listening.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
      _log.warning('--host=%s: everyone who reaches this machine can use the page', _HOST.value)
    name = f'[{host}]' if ':' in host else host
    print(f'open http://{name}:{port} in a browser; Ctrl-C ends it', flush=True)
    with playground_pages.server(playground_pages.Pages(playground, _HOST.value), listening) as web:
      web.serve_forever()


def _listen() -> socket.socket:
  host, port = _HOST.value, _PORT.value
  try:
    (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return socket.create_server(address[:2], family=family)
  except (OSError, UnicodeError) as error:
    reason = str(getattr(error, 'strerror', None) or error).partition(' (')[0]
    raise UserError(
      f'cannot listen on --host={host} --port={port}: {reason}; --port=0 takes any that is free'
    ) from error


if __name__ == '__main__':
  cli.run(main)
