"""Draws loss, accuracy, learning rate and memory of one or several runs.

  python -m hivit_jax.tools.plot WORKDIR... [--out=plot.png]

Or the learning rate of a config, before it runs; --epochs or --steps print it, exactly there:

  python -m hivit_jax.tools.plot --config=configs/finetune_swin_b.py:100 [--out=plot.png]
  python -m hivit_jax.tools.plot --config=configs/finetune_swin_b.py:100 --epochs=0,1.5,20 --json

With layer decay it is the rate of the head, and next to it that of the first layer. `config.init`
is not needed, and the data set only where the config counts in steps and you in epochs, or the
other way round, or where it does both.
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
_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config whose learning rate is drawn.')
_EPOCHS = flags.DEFINE_list('epochs', None, 'Print the rate at these epochs; fractions are fine.')
_STEPS = flags.DEFINE_list('steps', None, 'Print the rate at these steps; the first one is 0.')
_JSON = flags.DEFINE_bool('json', False, 'With --epochs or --steps: one JSON object of lists.')
_ONE = {'epochs': 'an epoch', 'steps': 'a step'}


def main(argv: list[str]) -> None:
  workdirs = list(dict.fromkeys(argv[1:]))
  if _CONFIG.value is None:
    for flag in (_EPOCHS, _STEPS, _JSON):
      if flag.value:
        raise UserError(f'--{flag.name} of what? --config=configs/mae_hivit_b.py')
    if not workdirs:
      raise UserError(
        'whose curves? python -m hivit_jax.tools.plot WORKDIR..., or --config=FILE for the '
        'learning rate of a config'
      )
    return _draw_runs(workdirs)
  if workdirs:
    raise UserError(f'"{workdirs[0]}" and --config: give runs or a config, not both')
  import jax

  jax.config.update('jax_platforms', 'cpu')  # an accelerator that others use is left alone
  asked = [flag for flag in (_EPOCHS, _STEPS) if flag.value is not None]
  if len(asked) > 1:
    raise UserError('--epochs and --steps: give one of them')
  if asked:
    return _print_rates(asked[0].name.removesuffix('s'), _parse(asked[0]))
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
  config = _CONFIG.value
  times = rates.grid(config)
  values = rates.learning_rates(config, times)
  _save(curves.draw_rates(name, times, values, unit=rates.unit(config)))


def _print_rates(unit: str, times: Sequence[float]) -> None:
  from hivit_jax.tools import rates

  values = rates.learning_rates(_CONFIG.value, times, per=unit)
  columns = {unit: times} | {key: rate.tolist() for key, rate in values.items()}
  if _JSON.value:
    print(json.dumps(columns))
    return
  print(''.join(f'{key:<20}' for key in columns).rstrip())
  for row in zip(*columns.values(), strict=True):
    print(''.join(f'{value:<20.12g}' for value in row).rstrip())


def _parse(flag: flags.FlagHolder) -> list[float]:
  times = []
  for text in flag.value:
    try:
      times.append(float(text))
    except ValueError:
      times.append(math.nan)
    if not 0 <= times[-1] < math.inf:
      raise UserError(
        f'--{flag.name}: "{text}" is not {_ONE[flag.name]}; expected numbers from 0 on: 0,1.5,20'
      )
  if not times:
    raise UserError(f'--{flag.name} is empty; expected numbers from 0 on: 0,1.5,20')
  return times


def _save(figure: Any) -> None:
  out = pathlib.Path(_OUT.value)
  with cli.writing('out', out):
    figure.savefig(out, format=out.suffix[1:] or 'png', dpi=150)
  print(f'wrote {out}')


if __name__ == '__main__':
  cli.run(main)
