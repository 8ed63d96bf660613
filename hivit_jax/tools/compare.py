"""Training steps of several configs, side by side in one run."""

import gc
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

from hivit_jax import cli
from hivit_jax.errors import UserError, suggest
from hivit_jax.tools.timing import Matmul, TrainingStep
from hivit_jax.train import assemble

# Groups of configs; within one, the first is what the others are compared with.
COMPARISONS = {
  'paper': {
    'pretraining': ('mae_hivit_b', 'mae_vit_b', 'simmim_swin_b'),
    'supervised': ('supervised_hivit_b', 'supervised_vit_b', 'supervised_swin_b'),
  },
  'ladder': {
    'from Swin-B to HiViT-B': (
      'supervised_swin_b',
      'ladder_1_three_stages',
      'ladder_2_global',
      'ladder_3_mlp_stem',
      'supervised_hivit_b',
    )
  },
}


def load(name: str) -> dict[str, dict[str, Any]]:
  """Configs of a comparison, by group and name.

  Args:
    name: a key of `COMPARISONS`, or names of files in configs/, separated by commas, each with its
      variant after a colon.
  """
  groups = COMPARISONS.get(name, {'steps': tuple(map(str.strip, name.split(',')))})
  return {group: {n: _load(n) for n in names} for group, names in groups.items()}


def _load(name: str) -> Any:
  file, colon, variant = name.partition(':')
  path = pathlib.Path('configs') / f'{file.removeprefix("configs/").removesuffix(".py")}.py'
  if not path.exists():
    known = [*COMPARISONS, *(path.stem for path in path.parent.glob('*.py'))]
    raise UserError(
      f'--compare: "{name}" is not a comparison, and no {path} exists{suggest(path.stem, known)}; '
      f'there are {", ".join(COMPARISONS)}, or configs separated by commas'
    )
  config = cli.config_from_file(f'{path}{colon}{variant}')
  assemble.check_model(config)  # says what is missing before others are measured
  return config


def run(
  groups: dict[str, dict[str, Any]],
  *,
  batch_size: int,
  rounds: int,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Measures the steps of each group in turns, so that other work on the machine slows all alike.

  Args:
    groups: from `load`.
    batch_size: images on each device.
    rounds: how often each step has its turn, each beside one large matrix product.
    say: called with a line about what is being done.

  Returns:
    `device`, `jax`, `batch_size`, `rounds` and `rows`, of which each has medians, and as `_range`
    the lowest and the highest round.
  """
  rows = []
  for group, configs in groups.items():
    steps = {}
    for name, config in configs.items():
      say(f'compiling {name}')
      steps[name] = TrainingStep(config, batch_size=batch_size)
    say(f'measuring {group}')
    rows += [{'group': group, **row} for row in _measure(steps, rounds)]
    mesh = next(iter(steps.values())).mesh
    del steps
    gc.collect()
  return {
    'device': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    'jax': jax.__version__,
    'batch_size': batch_size * mesh.size,
    'rounds': rounds,
    'rows': rows,
  }


def _measure(steps: dict[str, TrainingStep], rounds: int) -> list[dict[str, Any]]:
  first = next(iter(steps.values()))
  matmul = Matmul(first.dtype, first.mesh)
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  shares: dict[str, list[float]] = {name: [] for name in steps}
  for i in range(rounds):
    for name in list(steps)[:: 1 if i % 2 else -1]:  # nobody always follows the same one
      seconds[name].append(steps[name].seconds())
      shares[name].append(steps[name].flops / seconds[name][-1] / matmul.flops_per_second())
  rates = {n: [steps[n].config.batch_size / s for s in seconds[n]] for n in steps}
  reference = rates[next(iter(steps))]
  return [
    {
      'config': name,
      'model': one.config.model.name,
      'image_size': list(one.config.image_size),
      'dtype': one.dtype,
      **_spread('images_per_second', rates[name]),
      **_spread('ratio', [a / b for a, b in zip(rates[name], reference, strict=True)]),
      'gflop_per_image': one.flops / one.config.batch_size / 1e9,
      'memory_mb': one.memory / 1e6,
      **_spread('matmul_share', shares[name]),
    }
    for name, one in steps.items()
  ]


def _spread(key: str, values: Sequence[float]) -> dict[str, Any]:
  return {key: statistics.median(values), f'{key}_range': [min(values), max(values)]}


def markdown(report: dict[str, Any]) -> str:
  """The report as tables."""
  lines = [
    f'{report["device"]}, jax {report["jax"]}, batch {report["batch_size"]}: medians of '
    f'{report["rounds"]} rounds in turns, in brackets the lowest and the highest'
  ]
  group = None
  for r in report['rows']:
    if r['group'] != group:
      group = r['group']
      lines += [
        '',
        f'| {group} | image | dtype | images/s | ratio | GFLOP/image | memory, MB '
        '| share of matmul |',
        '|---|---|---|---:|---:|---:|---:|---:|',
      ]
    size = 'x'.join(map(str, r['image_size']))
    lines.append(
      f'| `{r["config"]}` | {size} | {r["dtype"]} | {_text(r, "images_per_second", ".2f")} '
      f'| {_text(r, "ratio", ".2f")} | {r["gflop_per_image"]:.1f} | {r["memory_mb"]:.0f} '
      f'| {_text(r, "matmul_share", ".0%")} |'
    )
  return '\n'.join(lines)


def _text(row: dict[str, Any], key: str, form: str) -> str:
  low, high = row[f'{key}_range']
  return f'{row[key]:{form}} ({low:{form}} to {high:{form}})'


def draw(report: dict[str, Any]) -> Any:
  """A matplotlib figure: images a second of every step, one panel a group."""
  from matplotlib.figure import Figure  # here: machines that only measure may lack it

  groups = list(dict.fromkeys(row['group'] for row in report['rows']))
  figure = Figure(figsize=(5 * len(groups), 3.2), layout='constrained')
  for i, group in enumerate(groups):
    rows = [row for row in report['rows'] if row['group'] == group]
    axes = figure.add_subplot(1, len(groups), 1 + i)
    rates = [row['images_per_second'] for row in rows]
    ranges = [row['images_per_second_range'] for row in rows]
    errors = [
      [rate - low for rate, (low, _) in zip(rates, ranges, strict=True)],
      [high - rate for rate, (_, high) in zip(rates, ranges, strict=True)],
    ]
    bars = axes.barh([row['config'] for row in rows], rates, xerr=errors, color='#56B4E9')
    labels = [f'{rate:#.3g} · {row["ratio"]:.2f}x' for rate, row in zip(rates, rows, strict=True)]
    axes.bar_label(bars, labels, label_type='center', fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel('images/s')
    axes.set_title(group, fontsize=10)
  title = f'{report["device"]}, batch {report["batch_size"]}, {report["rows"][0]["dtype"]}'
  figure.suptitle(title, fontsize=9)
  return figure
