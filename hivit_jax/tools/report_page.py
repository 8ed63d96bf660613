"""The report about a machine as a page, a file for programs and a picture."""

import contextlib
import json
import pathlib
from typing import Any

_KERNELS = 10  # of the slowest are listed


def markdown(report: dict[str, Any], command: str) -> str:
  """The report as a page."""
  machine = report['machine']
  lines = [
    f'# Training on {machine["device"]}',
    '',
    f'Measured on {machine["date"]} with `{command}` in {report["seconds"]:.0f} s: medians of '
    f'{report["rounds"]} rounds in turns with a large matrix product.',
    '',
    '| | |',
    '|---|---|',
    *(f'| {key.replace("_", " ")} | {_plain(value)} |' for key, value in machine.items()),
    '',
    '| training step | dtype | images a step | ms | images/s | GFLOP/image | share of matmul '
    '| share of roofline | memory, GB | host, ms | compile, s |',
    '|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|',
  ]
  for r in report['rows']:
    lines.append(
      f'| {r["name"]} | {r["dtype"]} | {r["batch_size"]} | {r["step_ms"]:.1f} '
      f'| {r["images_per_second"]:.4g} | {r["gflop_per_image"]:.1f} | {r["matmul_share"]:.1%} '
      f'| {r["roofline_share"]:.0%} | {r["memory_gb"]:.1f} | {r["host_ms"]:.1f} '
      f'| {r["compile_seconds"]:.0f} |'
    )
  lines += [
    '',
    'Share of matmul: the rate of the products in the step over that of one large product. '
    'Share of roofline: the longer of two times over that of the step: its products at that '
    'rate, and its memory traffic, as the compiler counts it, at the bandwidth of a copy. '
    'Memory: state, batch and temporaries, as compiled. Host: time to start the step.',
  ]
  for name, table in report['kernels'].items():
    total = sum(kernel['milliseconds'] for kernel in table)
    lines += [
      '',
      f'## Kernels: {name}',
      '',
      '| kernel | calls | ms | share |',
      '|---|---:|---:|---:|',
    ]
    lines += [
      f'| `{k["name"][:80]}` | {k["calls"]:.0f} | {k["milliseconds"]:.2f} '
      f'| {k["milliseconds"] / total:.1%} |'
      for k in table[:_KERNELS]
    ]
    lines += [f'| all {len(table)} | | {total:.2f} | |']
  if report['missing']:
    lines += ['', '## Not measured', '']
    lines += [f'- {name}: {reason}' for name, reason in report['missing'].items()]
  return '\n'.join(lines) + '\n'


def _plain(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def draw(report: dict[str, Any]) -> Any:
  """A matplotlib figure: images a second and share of the matmul rate of every step."""
  from matplotlib.figure import Figure  # here: machines that only measure may lack it

  rows = report['rows']
  names = [row['name'] for row in rows]
  figure = Figure(figsize=(10, 1.2 + 0.4 * len(rows)), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True)
  rates = [row['images_per_second'] for row in rows]
  shares = [100 * row['matmul_share'] for row in rows]
  rate = '{:.0f}' if max(rates, default=0) >= 100 else '{:.2f}'
  panels = ((left, rates, rate, 'images/s'), (right, shares, '{:.1f} %', 'share of matmul, %'))
  for axes, values, form, label in panels:
    bars = axes.barh(names, values, color='#56B4E9')
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.set_xlabel(label)
    axes.set_xlim(0, 1.3 * max(values, default=1))
  left.invert_yaxis()
  machine = report['machine']
  figure.suptitle(f'{machine["device"]}, jax {machine["jax"]}, {machine["date"]}', fontsize=9)
  return figure


def write(report: dict[str, Any], folder: pathlib.Path, command: str) -> None:
  """Writes report.md, report.json and, where matplotlib is installed, report.png."""
  (folder / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
  (folder / 'report.md').write_text(markdown(report, command))
  with contextlib.suppress(ImportError):
    draw(report).savefig(folder / 'report.png', dpi=150)
