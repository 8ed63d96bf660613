"""Plans a training step for TPUs or GPUs: memory, work, communication, from the compiler alone.

  python -m hivit_jax.tools.plan --config=configs/mae_hivit_b.py --topology=v5e:4x4
  python -m hivit_jax.tools.plan --config=configs/mae_hivit_b.py --topology=h200:1 --batch_size=256
  python -m hivit_jax.tools.plan --config=configs/mae_hivit_b.py --topology=cpu:8 --batch_size=4

Compiles the step as training would, for devices that need not be there, and allocates nothing. TPUs
need libtpu, GPUs JAX's CUDA plugin, simulated CPUs nothing. docs/guide/scaling.md explains the
numbers.
"""

import json
from typing import Any

from absl import flags
from ml_collections import config_flags

from hivit_jax import cli
from hivit_jax.errors import UserError
from hivit_jax.planning import plan

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config whose training step is planned.')
_TOPOLOGY = flags.DEFINE_string('topology', None, 'Devices: v5e:4x4, h200:8, ..., or cpu:8.')
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', None, 'Images per step and device; default: config.batch_size over all devices.',
  lower_bound=1,
)  # fmt: skip
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object instead of text.')

_GIB = 2**30


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise UserError(f'unexpected argument "{argv[1]}"')
  if _CONFIG.value is None:
    raise UserError('what to plan? --config=configs/mae_hivit_b.py')
  if _TOPOLOGY.value is None:
    raise UserError('for which devices? --topology=v5e:4x4, or --topology=cpu:8 without libtpu')
  report = plan.plan_for(_CONFIG.value, _TOPOLOGY.value, batch_size=_BATCH_SIZE.value)
  print(json.dumps(report) if _JSON.value else format_report(report))


def format_report(report: dict[str, Any]) -> str:
  """The report as lines for a person."""
  r, mesh = report, ' '.join(f'{axis}={size}' for axis, size in report['mesh'].items())
  lines = [
    f'{r["model"]} {r["image_size"][0]}x{r["image_size"][1]}, {r["task"]}, batch {r["batch_size"]} '
    f'({r["batch_size"] // r["devices"]} a device), {r["dtype"]}'
    + (f', attention {r["attention"]}' if r['attention'] != 'xla' else ''),
    f'{r["topology"]}: {r["devices"]} x {r["device_kind"]}, {mesh}, jax {r["jax"]}',
    'Compiled, not run; times are estimates. All numbers are of one step on one device.',
    '',
    f'fits               {_verdict(r)}',
    *(f'  {name:<16} {size / _GIB:9.3f} GiB' for name, size in r['memory'].items()),
    f'matrix products    {r["matmul_flops"] / 1e12:9.3f} TFLOP',
    f'memory traffic     {r["memory_traffic"] / 1e9:9.3f} GB at least',
  ]
  if not r['fits']:
    return '\n'.join([*lines, f'what helps         {r["helps"]}, a smaller batch'])
  lines += [
    f'compiled in        {r["compile_seconds"]:9.0f} s',
    '',
    'collectives           number  payload, MB   sent, MB   among',
    *(
      f'  {row["kind"]:<18} {row["count"]:7d} {row["bytes"] / 1e6:12.1f} {row["sent"] / 1e6:10.1f}'
      f'   {row["devices"]} devices'
      + ('' if row['complete'] else '; at least: in a loop of unknown length')
      for row in r['collectives']
    ),
  ]
  if r.get('estimate'):
    lines += ['', *_format_estimate(r, r['estimate'])]
  return '\n'.join(lines)


def _format_estimate(r: dict[str, Any], estimate: dict[str, Any]) -> list[str]:
  def rate(seconds: float) -> str:
    each = r['batch_size'] / seconds
    return f'{1e3 * seconds:9.1f} ms  {each:8.0f} images/s, {each / r["devices"]:.0f} a device'

  return [
    'estimate',
    *(f'  {name:<16} {1e3 * estimate[name]:9.1f} ms' for name in ('products', 'memory', 'network')),
    f'  overlapped       {rate(estimate["overlapped"])}: only {estimate["limiter"]} takes time',
    f'  serial           {rate(estimate["serial"])}: nothing overlaps',
  ]


def _verdict(r: dict[str, Any]) -> str:
  if not r['fits']:
    return f'NO: {r["refusal"] or _share(r)}'
  if not r['hbm']:
    return f'{r["memory"]["total"] / _GIB:.2f} GiB needed; how much there is depends on the machine'
  return f'yes: {_share(r)}'


def _share(r: dict[str, Any]) -> str:
  return f'{r["memory"]["total"] / _GIB:.2f} of {r["hbm"] / _GIB:.2f} GiB'


if __name__ == '__main__':
  cli.run(main)
