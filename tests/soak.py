"""A long run with an eye on memory and speed: python -m tests.soak --workdir=/tmp/hivit_soak

Trains the demo for ten times its epochs, draws memory and images/s into soak.png in the workdir,
and says whether they stay what they were. Started again after a stop it goes on, or looks at the
finished run. Other flags are given to main.py: --config.batch_size=64.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
from matplotlib.figure import Figure

from hivit_jax import cli
from hivit_jax.tools import curves
from tests.runs import ROOT

_TIMES = 10
# Metric -> the last tenth of the run over the second tenth, at least or at most. In the first
# tenth caches fill: compiled programs, what malloc keeps.
BOUNDS = {
  'train/images_per_second': (0.9, None),
  'train/host_memory_mb': (None, 1.05),
  'train/device_memory_mb': (None, 1.05),
}


def verdict(rows: curves.Rows) -> tuple[bool, list[str]]:
  """Compares medians of the last tenth of a run with those of its second tenth.

  Args:
    rows: metrics by step, of at least 20 log lines.

  Returns:
    Whether all is as it should be, and a line for each metric.
  """
  end = max(rows)
  sound, lines = True, []
  for metric, (least, most) in BOUNDS.items():
    steps = np.array([step for step, row in rows.items() if metric in row])
    values = np.array([row[metric] for row in rows.values() if metric in row])
    if len(steps) < 20:
      raise SystemExit(
        f'{len(steps)} log lines with {metric} do not tell: --config.log_every_steps'
      )
    early = np.median(values[(steps > 0.1 * end) & (steps <= 0.2 * end)])
    late = np.median(values[steps > 0.9 * end])
    ratio = float(late / early)
    good = (least is None or ratio >= least) and (most is None or ratio <= most)
    sound &= good
    bound = f'at least {least}' if least else f'at most {most}'
    lines.append(
      f'{"ok" if good else "BAD":3} {metric:23} second tenth {early:9.1f}, last {late:9.1f}, '
      f'ratio {ratio:.3f} ({bound})'
    )
  return sound, lines


def draw(rows: curves.Rows) -> Figure:
  """Memory and images/s over the steps, each from zero, so that a slope is seen for what it is."""
  panels = {
    'memory (MB)': ('train/host_memory_mb', 'train/device_memory_mb'),
    'images/s': ('train/images_per_second',),
  }
  figure = Figure(figsize=(10, 3.4), layout='constrained')
  for axis, (title, metrics) in zip(figure.subplots(1, 2), panels.items(), strict=True):
    for metric in metrics:
      points = [(step, row[metric]) for step, row in rows.items() if metric in row]
      axis.plot(*zip(*points, strict=True), label=metric, linewidth=1)
    axis.set(title=title, xlabel='step', ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
  return figure


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m tests.soak', description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--config', default='configs/demo.py')
  parser.add_argument('--steps', type=int, help='instead of ten times the epochs of the config')
  arguments, others = parser.parse_known_args()
  if arguments.steps:
    length = f'--config.max_steps={arguments.steps}'
  else:
    length = f'--config.epochs={cli.config_from_file(arguments.config).epochs * _TIMES}'
  workdir = arguments.workdir.absolute()
  flags = [f'--config={arguments.config}', f'--workdir={workdir}', length, *others]
  ended = subprocess.run([sys.executable, 'main.py', *flags], cwd=ROOT)
  if ended.returncode:
    sys.exit(ended.returncode)
  rows = curves.read_metrics(workdir)
  draw(rows).savefig(workdir / 'soak.png', dpi=120)
  sound, lines = verdict(rows)
  print(*lines, f'wrote {workdir}/soak.png', sep='\n')
  sys.exit(not sound)


if __name__ == '__main__':
  main()
