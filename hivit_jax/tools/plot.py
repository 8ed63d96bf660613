"""Loss, accuracy, learning rate and memory of one or several runs as one picture.

  python -m hivit_jax.tools.plot WORKDIR... [--out=plot.png]

Or the learning rate of a config, before it runs; --epochs prints it instead, exactly there:

  python -m hivit_jax.tools.plot --config=configs/finetune_swin_b.py:100 [--out=plot.png]
  python -m hivit_jax.tools.plot --config=configs/finetune_swin_b.py:100 --epochs=0,1.5,20 --json

With layer decay it is the rate of the head, and next to it that of the first layer. Neither the
data set nor `config.init` is needed.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from hivit_jax import cli
from hivit_jax.errors import UserError

_OUT = flags.DEFINE_string('out', 'plot.png', 'Picture to write: .png, .pdf or .svg.')
_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config whose learning rate to draw.')
_EPOCHS = flags.DEFINE_list('epochs', None, 'Print the rate at these epochs; fractions count.')
_JSON = flags.DEFINE_bool('json', False, 'With --epochs: one JSON object of lists.')


def main(argv: list[str]) -> None:
  workdirs = list(dict.fromkeys(argv[1:]))
  if _CONFIG.value is None:
    for flag in (_EPOCHS, _JSON):
      if flag.value:
        raise UserError(f'--{flag.name} of what? --config=configs/mae_hivit_b.py')
    if not workdirs:
      raise UserError(
        'whose curves? python -m hivit_jax.tools.plot WORKDIR..., or --config=FILE for the '
        'learning rate of a config'
      )
    return _draw_runs(workdirs)
  if workdirs:
    raise UserError(f'"{workdirs[0]}" and --config: either runs are drawn, or a config')
  import jax

  jax.config.update('jax_platforms', 'cpu')  # an accelerator that others use is left alone
  if _EPOCHS.value is not None:
    return _print_rates(_parse(_EPOCHS.value))
  if _JSON.value:
    raise UserError('--json: at which epochs? --epochs=0,1.5,20')
  return _draw_config()


def _draw_runs(workdirs: Sequence[str]) -> None:
  from hivit_jax.tools import curves  # here, so that --help answers at once

  rows = map(curves.read_metrics, workdirs)
  _save(curves.draw(dict(zip(curves.short_names(workdirs), rows, strict=True))))


def _draw_config() -> None:
  from hivit_jax.tools import curves, rates

  path, _, variant = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
  name = ':'.join(filter(None, (pathlib.Path(path).stem, variant)))
  epochs = rates.grid(_CONFIG.value)
  _save(curves.draw_rates(name, epochs, rates.learning_rates(_CONFIG.value, epochs)))


def _print_rates(epochs: Sequence[float]) -> None:
  from hivit_jax.tools import rates

  columns = {'epoch': epochs} | {
    key: values.tolist() for key, values in rates.learning_rates(_CONFIG.value, epochs).items()
  }
  if _JSON.value:
    print(json.dumps(columns))
    return
  print(''.join(f'{key:<20}' for key in columns).rstrip())
  for row in zip(*columns.values(), strict=True):
    print(''.join(f'{value:<20.12g}' for value in row).rstrip())


def _parse(texts: Sequence[str]) -> list[float]:
  epochs = []
  for text in texts:
    try:
      epochs.append(float(text))
    except ValueError:
      epochs.append(math.nan)
    if not 0 <= epochs[-1] < math.inf:
      raise UserError(f'--epochs: "{text}" is no epoch; expected numbers from 0 on: 0,1.5,20')
  if not epochs:
    raise UserError('--epochs is empty; expected numbers from 0 on: 0,1.5,20')
  return epochs


def _save(figure: Any) -> None:
  out = pathlib.Path(_OUT.value)
  with cli.writing('out', out):
    figure.savefig(out, format=out.suffix[1:] or 'png', dpi=150)
  print(f'wrote {out}')


if __name__ == '__main__':
  cli.run(main)
