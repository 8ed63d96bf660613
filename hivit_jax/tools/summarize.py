"""Counts parameters, multiply-adds and activations of the models.

  python -m hivit_jax.tools.summarize
  python -m hivit_jax.tools.summarize --models=hivit_base,swin_base --image_size=384

Autoencoders are counted as they are pretrained: encoder on what it sees, decoder, loss. Swin gets
windows of --image_size / 32, as published for 192, 224 and 384 pixels.
"""

import json
import math
from typing import Any

from absl import flags

from hivit_jax import cli, models, settings
from hivit_jax.errors import UserError
from hivit_jax.tools.sizes import format_table, summary

_MODELS = flags.DEFINE_list('models', None, 'Names, separated by commas; default: all models.')
_IMAGE_SIZE = flags.DEFINE_string('image_size', None, 'In pixels: one side, or HEIGHTxWIDTH.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object per model instead of a table.')


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise UserError(f'unexpected argument "{argv[1]}"')
  size = None
  if _IMAGE_SIZE.value is not None:
    size = settings.image_size(_IMAGE_SIZE.value, '--image_size')
  rows = [summary(name, **_options(name, size)) for name in _MODELS.value or models.list_models()]
  print('\n'.join(map(json.dumps, rows)) if _JSON.value else format_table(rows))


def _options(name: str, size: tuple[int, int] | None) -> dict[str, Any]:
  if size is None:
    return {}
  known = models.settings_of(name) if name in models.MODELS else {}
  windows = {'window_size': max(1, math.gcd(*size) // 32)} if 'window_size' in known else {}
  return {'image_size': size, **windows}


if __name__ == '__main__':
  cli.run(main)
