"""Measures a training step, as a share of the speed of a large matrix product on this machine.

  python -m hivit_jax.tools.benchmark --config=configs/mae_hivit_b.py --batch_size=8
  python -m hivit_jax.tools.benchmark --compare=paper --out=comparison
  python -m hivit_jax.tools.benchmark --data [--beside=PYTHON]
  python -m hivit_jax.tools.benchmark --report=DIR --minutes=5

The first measures the whole step (gradient, optimizer) on synthetic images; the second the steps of
the paper's comparison side by side (or of --compare=ladder, or of configs separated by commas); the
third the input pipelines of pretraining and supervised training, compared with bare decoding; the
fourth all models that `tools.report` lists, on whatever accelerator there is. Steps and the
reference product take turns, so that other work on the machine slows all alike. Reported are
medians.
"""

import importlib.util
import json
import pathlib
import resource
import statistics
import sys
import tempfile
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from hivit_jax import cli, models
from hivit_jax.errors import UserError
from hivit_jax.reporting.console import setup_logging
from hivit_jax.runtime import host_memory
from hivit_jax.tools.timing import Matmul, TrainingStep
from hivit_jax.train import assemble, synthetic

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config whose training step is measured.')
_COMPARE = flags.DEFINE_string('compare', None, 'paper, ladder, or configs, separated by commas.')
_DATA = flags.DEFINE_bool('data', False, 'Measure the input pipelines instead.')
_BESIDE = flags.DEFINE_string(
  'beside', None, 'With --data: a Python with torch, torchvision and tensorflow, to compare with.'
)
_REPORT = flags.DEFINE_string(
  'report', None, 'Directory for report.md, .json and .png about this machine.'
)
_MINUTES = flags.DEFINE_float(
  'minutes',
  None,
  'With --report: stop after about this time; the last models are left out.',
  lower_bound=0,
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size',
  None,
  'Images per step and device; default 8, with --report the largest power of two that fits.',
  lower_bound=1,
)
_STEPS = flags.DEFINE_integer('steps', 10, 'Steps to measure.', lower_bound=1)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object instead of text.')
_OUT = flags.DEFINE_string(
  'out', None, 'With --compare: directory for comparison.md, .json and .png.'
)

_STARTS = 100  # of a step, for the host's time


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise UserError(f'unexpected argument "{argv[1]}"')
  given = (_CONFIG.value, _COMPARE.value, _REPORT.value, _DATA.value or None)
  if sum(value is not None for value in given) != 1:
    raise UserError(
      'what to measure? Give --config=configs/mae_hivit_b.py, --compare=paper, --report=DIR, or '
      '--data for the input pipeline'
    )
  if _MINUTES.value is not None and _REPORT.value is None:
    raise UserError('--minutes needs --report')
  if _BESIDE.value is not None and not _DATA.value:
    raise UserError('--beside needs --data')
  if _OUT.value is not None and _COMPARE.value is None:
    raise UserError('--out needs --compare')
  jax.config.update('jax_enable_compilation_cache', False)  # compilation is measured, too
  if _DATA.value:
    setup_logging()
    from hivit_jax.tools import data_benchmark

    data_benchmark.main(as_json=_JSON.value, beside=_BESIDE.value)
  elif _REPORT.value is not None:
    _report(pathlib.Path(_REPORT.value))
  elif _COMPARE.value is not None:
    _compare(_COMPARE.value)
  else:
    host_memory.keep_freed_memory(one_arena=assemble.is_large(_CONFIG.value))
    setup_logging()
    report = measure_step(_CONFIG.value, batch_size=_BATCH_SIZE.value or 8, repeats=_STEPS.value)
    print(json.dumps(report) if _JSON.value else format_report(report))


def _compare(name: str) -> None:
  from hivit_jax.tools import compare

  groups = compare.load(name)
  out = None if _OUT.value is None else pathlib.Path(_OUT.value)
  if out is not None:  # before the minutes of measuring
    if importlib.util.find_spec('matplotlib') is None:
      raise UserError('--out draws with matplotlib, which is not installed; --json prints numbers')
    _make_writable('out', out)
  large = any(assemble.is_large(config) for group in groups.values() for config in group.values())
  host_memory.keep_freed_memory(one_arena=large)
  setup_logging()
  report = compare.run(
    groups,
    batch_size=_BATCH_SIZE.value or 8,
    rounds=_STEPS.value,
    say=_say,
  )
  text = compare.markdown(report)
  print(json.dumps(report) if _JSON.value else text)
  if out is not None:
    (out / 'comparison.md').write_text(text + '\n')
    (out / 'comparison.json').write_text(json.dumps(report, indent=2) + '\n')
    compare.draw(report).savefig(out / 'comparison.png', dpi=150)


def _report(folder: pathlib.Path) -> None:
  from hivit_jax.tools import report, report_page

  _make_writable('report', folder)
  host_memory.keep_freed_memory(one_arena=True)
  setup_logging()
  found = report.measure(
    batch_size=_BATCH_SIZE.value, rounds=_STEPS.value, minutes=_MINUTES.value, say=_say
  )
  command = ' '.join(['python -m hivit_jax.tools.benchmark', *sys.argv[1:]])
  report_page.write(found, folder, command)
  print(json.dumps(found) if _JSON.value else report_page.markdown(found, command))


def _make_writable(flag: str, folder: pathlib.Path) -> None:
  """Makes the directory of a flag, before the minutes of measuring."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise UserError(f'cannot write to --{flag}={folder}: {error.strerror}') from error


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def measure_step(
  config: ml_collections.ConfigDict, *, batch_size: int, repeats: int
) -> dict[str, Any]:
  """Compiles and times the training step of a config.

  Args:
    config: see configs/base.py.
    batch_size: images on each device.
    repeats: measurements.

  Returns:
    Numbers by name, units in the names; what each means is in docs/internals/performance-ledger.md.
  """
  step = TrainingStep(config, batch_size=batch_size)
  step.start()
  device = jax.devices()[0]
  peak = _peak_memory(device)  # before there is another program
  matmul = Matmul(step.dtype, step.mesh)
  pairs = [(step.seconds(), matmul.flops_per_second()) for _ in range(repeats)]
  seconds = statistics.median(s for s, _ in pairs)
  shares = sorted(step.flops / s / rate for s, rate in pairs)
  images = step.config.batch_size
  starts = _host_seconds(config)
  return {
    'model': config.model.name,
    'image_size': list(synthetic.canvas(config)),
    'device': f'{step.mesh.size} x {device.device_kind}',
    'jax': jax.__version__,
    'dtype': step.dtype,
    'batch_size': images,
    'trace_seconds': step.trace_seconds,
    'compile_seconds': step.compile_seconds,
    'step_ms': 1e3 * seconds,
    'step_ms_fastest': 1e3 * min(s for s, _ in pairs),
    'images_per_second': images / seconds,
    'gflop_per_image': step.flops / images / 1e9,
    'gflops': step.flops / seconds / 1e9,
    'matmul_gflops': statistics.median(rate for _, rate in pairs) / 1e9,
    'matmul_share': statistics.median(shares),
    'matmul_share_range': [shares[0], shares[-1]],
    'step_memory_mb': step.memory / 1e6,
    'peak_memory_mb': peak / 1e6,
    'host_ms_per_step': 1e3 * statistics.median(starts),
    'host_ms_fastest': 1e3 * min(starts),
  }


def _host_seconds(config: ml_collections.ConfigDict) -> list[float]:
  """Times that the host needs to start a step.

  Measured on the same model made narrow, with two images a device, so that the device is done
  before the host is: what is left is flattening the state's tree, checking it, and starting the
  program.
  """
  config = config.copy_and_resolve_references()
  own = models.settings_of(config.model.name)
  if 'window_size' in own:  # windows of 4 cover 64 pixels
    config.image_size = (64, 64)
    config.model.update(embed_dim=24, window_size=4)
  else:
    config.image_size = (32, 32)
    config.model.update(embed_dim=16, num_heads=1)
  if 'decoder_num_heads' in own:
    config.model.update(decoder_embed_dim=16, decoder_num_heads=1)
  config.detect.buckets = ()
  config.segment.stride = config.image_size  # a window larger than the image is refused
  step = TrainingStep(config, batch_size=2 * config.accumulate_steps)  # BatchNorm takes two
  return [step.host_seconds() for _ in range(2 + _STARTS)][2:]


def _peak_memory(device: Any) -> int:
  """Bytes: of the device where it counts them, else of this process."""
  stats = device.memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_report(report: dict[str, Any]) -> str:
  """The report as lines for a person."""
  r = report
  low, high = r['matmul_share_range']
  return '\n'.join(
    (
      f'{r["model"]} {r["image_size"][0]}x{r["image_size"][1]}, batch {r["batch_size"]}, '
      f'{r["dtype"]}, {r["device"]}, jax {r["jax"]}',
      f'compile          {r["compile_seconds"]:8.1f} s   (and {r["trace_seconds"]:.1f} s to trace)',
      f'step             {r["step_ms"]:8.1f} ms  median, fastest {r["step_ms_fastest"]:.1f}',
      f'throughput       {r["images_per_second"]:8.1f} images/s',
      f'work             {r["gflop_per_image"]:8.1f} GFLOP/image, forward and backward',
      f'rate             {r["gflops"]:8.0f} GFLOP/s',
      f'large matmul     {r["matmul_gflops"]:8.0f} GFLOP/s',
      f'share of matmul  {100 * r["matmul_share"]:8.1f} %   ({100 * low:.0f} to {100 * high:.0f})',
      f'memory           {r["step_memory_mb"]:8.0f} MB  state and temporaries; '
      f'peak {r["peak_memory_mb"]:.0f} MB',
      f'host             {r["host_ms_per_step"]:8.2f} ms/step to start a step, median, '
      f'fastest {r["host_ms_fastest"]:.2f}',
    )
  )


if __name__ == '__main__':
  cli.run(main)
