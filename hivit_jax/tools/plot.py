"""Loss, accuracy, learning rate and memory of one or several runs as one picture.

python -m hivit_jax.tools.plot WORKDIR... [--out=plot.png]
"""

import pathlib

from absl import flags

from hivit_jax import cli
from hivit_jax.errors import UserError

_OUT = flags.DEFINE_string('out', 'plot.png', 'Picture to write: .png, .pdf or .svg.')


def main(argv: list[str]) -> None:
  from hivit_jax.tools import curves  # here, so that --help answers at once

  workdirs = list(dict.fromkeys(argv[1:]))
  if not workdirs:
    raise UserError('whose curves? python -m hivit_jax.tools.plot WORKDIR...')
  rows = map(curves.read_metrics, workdirs)
  figure = curves.draw(dict(zip(curves.short_names(workdirs), rows, strict=True)))
  out = pathlib.Path(_OUT.value)
  try:
    figure.savefig(out, format=out.suffix[1:] or 'png', dpi=150)
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'cannot write --out={out}: {reason}') from error
  print(f'wrote {out}')


if __name__ == '__main__':
  cli.run(main)
