"""Curves of runs, from what `MetricWriter` leaves in `metrics.jsonl`, and of configs."""

import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hivit_jax.errors import UserError
from hivit_jax.reporting.metrics import rows_in
from hivit_jax.train import places

Rows = dict[int, dict[str, float]]  # metrics by step, in order of the steps

_EPOCH = 'train/epoch'
# Panel -> its metrics. Any other metric of an evaluation has a panel to itself.
_PANELS = {
  'loss': r'(train|eval\w*)/(\w+_)?loss',
  'accuracy': r'(train|eval\w*)/(\w+_)?(top\d+|accuracy)',
  'learning rate': r'train/learning_rate',
  'memory (MB)': r'train/(host|device)_memory_mb',
}
_COLUMNS = 3
# Okabe and Ito's palette, which colour-blind people tell apart, without its yellow.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_STYLES = ('-', '--', ':', '-.', (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
_FEW_POINTS = 30  # so many are marked


def read_metrics(workdir: str | os.PathLike[str]) -> Rows:
  """Reads `metrics.jsonl` of a run, which may be going on.

  A truncated line is skipped. If a metric appears twice for one step, as after an interruption, the
  last value counts. null becomes NaN.

  Raises:
    UserError: there is no such file, or nothing in it.
  """
  path = pathlib.Path(places.local(workdir)).expanduser() / 'metrics.jsonl'
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}; give the --workdir of a run') from error
  rows: Rows = {}
  for row in rows_in(content):
    values = {
      k: math.nan if v is None else float(v)
      for k, v in row.items()
      if k != 'step' and isinstance(v, int | float | None)
    }
    rows.setdefault(row['step'], {}).update(values)
  if not any(rows.values()):
    raise UserError(f'{path} has no metrics yet')
  return dict(sorted(rows.items()))


def short_names(workdirs: Sequence[str | os.PathLike[str]]) -> list[str]:
  """The last parts of the paths, as few as distinguish them, without a common ending."""
  paths = [pathlib.Path(os.path.abspath(os.path.expanduser(path))).parts for path in workdirs]
  if len(paths) == 1:
    return [paths[0][-1]]
  while len({path[-1] for path in paths}) == 1 and min(map(len, paths)) > 1:
    paths = [path[:-1] for path in paths]
  count = 1
  while len({path[-count:] for path in paths}) < len(set(paths)):
    count += 1
  return [os.path.join(*path[-count:]) for path in paths]


def draw(runs: Mapping[str, Rows]) -> Figure:
  """Loss, accuracies, learning rate, memory and other `eval/` metrics over the training.

  The x axis has epochs if every run records them, else steps. Lines have the gid `RUN METRIC`.
  With several runs the colour shows the run and the dashes show the metric.

  Args:
    runs: rows by the name of the run, see `read_metrics`.

  Raises:
    UserError: there is no metric to be drawn.
  """
  panels = _panels({metric for rows in runs.values() for row in rows.values() for metric in row})
  if not panels:
    raise UserError(f'{", ".join(runs)}: nothing to draw: no loss, learning rate or evaluation')
  converters = [_to_epochs(rows) for rows in runs.values()]
  in_epochs = None not in converters
  xs = [to_epochs if in_epochs and to_epochs else np.asarray for to_epochs in converters]
  columns = min(len(panels), _COLUMNS)
  height = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(1 + 4.2 * columns, 0.8 + 3.4 * height), layout='constrained')
  axes = list(figure.subplots(height, columns, squeeze=False).flat)
  colors = _colors(len(runs))
  for axis, (title, metrics) in zip(axes, panels.items(), strict=False):
    for i, (metric, style) in enumerate(zip(metrics, _STYLES * len(metrics), strict=False)):
      for (name, rows), to_x, color in zip(runs.items(), xs, colors, strict=True):
        steps = [step for step, row in rows.items() if metric in row]
        axis.plot(
          to_x(steps),
          [rows[step][metric] for step in steps],
          gid=f'{name} {metric}',
          color=color if len(runs) > 1 else _COLORS[i % len(_COLORS)],
          linestyle=style if len(runs) > 1 else '-',
          linewidth=1.3,
          marker='o' if len(steps) <= _FEW_POINTS else '',
          markersize=3,
        )
    _finish(axis, title, metrics, several_runs=len(runs) > 1)
    axis.set_xlabel('epoch' if in_epochs else 'step')
  for axis in axes[len(panels) :]:
    axis.remove()
  if len(runs) > 1:
    handles = [Line2D([], [], color=c, label=n) for n, c in zip(runs, colors, strict=True)]
    figure.legend(handles=handles, loc='outside upper center', ncols=4, frameon=False)
  else:
    figure.suptitle(next(iter(runs)))
  return figure


def draw_rates(
  name: str, times: np.ndarray, rates: Mapping[str, np.ndarray], *, unit: str = 'epoch'
) -> Figure:
  """Learning rates over time, each in a panel of its own: a layer's may be a thousandth.

  Args:
    name: of the config.
    times: (N,).
    unit: of the times.
    rates: (N,) each, from `rates.learning_rates`; the gid of a line is the key.
  """
  figure = Figure(figsize=(1 + 4.2 * len(rates), 4.2), layout='constrained')
  axes = figure.subplots(1, len(rates), squeeze=False)[0]
  layered = ('learning rate of the head', 'of the first layer')
  titles = layered if len(rates) > 1 else ('learning rate',)
  for axis, title, (key, values), color in zip(axes, titles, rates.items(), _COLORS, strict=False):
    axis.plot(times, values, gid=key, color=color, linewidth=1.3)
    _finish(axis, title, [title], several_runs=False)
    axis.set_xlabel(unit)
    axis.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
  figure.suptitle(name)
  return figure


def _panels(metrics: set[str]) -> dict[str, list[str]]:
  """Title -> metrics; training before evaluation, and averaged weights last."""
  panels: dict[str, list[str]] = {title: [] for title in _PANELS}
  for metric in sorted(metrics, key=lambda m: (not m.startswith('train/'), 'ema' in m, m)):
    titles = [title for title, pattern in _PANELS.items() if re.fullmatch(pattern, metric)]
    if titles or not metric.startswith('train/'):
      panels.setdefault(titles[0] if titles else metric, []).append(metric)
  return {title: found for title, found in panels.items() if found}


def _to_epochs(rows: Rows) -> Callable[[Sequence[int]], Any] | None:
  """A function from steps to epochs; None if the run does not record them."""
  known = {step: row[_EPOCH] for step, row in rows.items() if step and _EPOCH in row}
  if not known:
    return None
  steps, epochs = [0, *known], [0.0, *known.values()]
  rate = epochs[-1] / steps[-1]  # for evaluations after the last line of training metrics
  return lambda x: np.interp(x, steps, epochs) + rate * np.maximum(np.subtract(x, steps[-1]), 0)


def _colors(count: int) -> Sequence[Any]:
  """More runs than the palette has colours get a scale from dark to light, in their order."""
  if count <= len(_COLORS):
    return _COLORS[:count]
  return list(matplotlib.colormaps['viridis'](np.linspace(0, 0.9, count)))


def _finish(axis: Axes, title: str, metrics: Sequence[str], *, several_runs: bool) -> None:
  axis.set_title(title if len(metrics) > 1 else metrics[0], fontsize=10)
  axis.spines[['top', 'right']].set_visible(False)
  axis.grid(alpha=0.3, linewidth=0.6)
  if len(metrics) > 1 and several_runs:
    styles = zip(metrics, _STYLES * len(metrics), strict=False)
    handles = [Line2D([], [], color='dimgray', linestyle=s, label=m) for m, s in styles]
    axis.legend(handles=handles, fontsize=8, frameon=False, handlelength=3)
  elif len(metrics) > 1:
    axis.legend(axis.lines, metrics, fontsize=8, frameon=False)
