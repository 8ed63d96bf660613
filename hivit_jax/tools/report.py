"""How fast this machine's accelerator trains the models: everything in one table.

What is measured, and in which order, is `ENTRIES`. A few steps at a time are compiled, side by side
because it takes minutes, and then timed, alone because a compilation disturbs what runs beside it.
"""

import concurrent.futures
import dataclasses
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax import cli
from hivit_jax.tools import kernels
from hivit_jax.tools.timing import Matmul, TrainingStep

LARGEST_BATCH = 1024  # images a device
_FIRST_BATCH = 256  # compiled first; its memory tells which batch is the largest that fits
_CPU_BATCH = 8
_SIDE_BY_SIDE = 6  # compilations: more take longer until the first is done
_COPIED = 2**30  # bytes of the array for the copy's bandwidth


@dataclasses.dataclass(frozen=True)
class Entry:
  """A training step to measure.

  Attributes:
    name: of the row.
    config: file in configs/, without its ending, with or without a variant after a colon.
    settings: of the config, by dotted name.
    nvidia: whether only NVIDIA GPUs run it.
    profiled: whether the report lists its kernels.
  """

  name: str
  config: str
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  nvidia: bool = False
  profiled: bool = False


_XLA, _CUDNN = {'model.attention': 'xla'}, {'model.attention': 'cudnn'}
# The most important first: with little time the last are left out.
ENTRIES = (
  Entry('pretrain HiViT-B (MAE)', 'mae_hivit_b', profiled=True),
  Entry('pretrain Swin-B (SimMIM)', 'simmim_swin_b'),
  Entry('pretrain ViT-B (MAE)', 'mae_vit_b'),
  Entry('finetune HiViT-B', 'finetune_hivit_b', profiled=True),
  Entry('pretrain HiViT-B (MAE), attention by XLA', 'mae_hivit_b', _XLA, nvidia=True),
  Entry('pretrain HiViT-B (MAE), attention by cuDNN', 'mae_hivit_b', _CUDNN, nvidia=True),
  Entry('supervised HiViT-B', 'supervised_hivit_b'),
  Entry('pretrain HiViT-S (MAE)', 'mae_hivit_s'),
  Entry('pretrain HiViT-T (MAE)', 'mae_hivit_t'),
  Entry('pretrain HiViT-L (MAE)', 'mae_hivit_l'),
)


def measure(
  entries: Sequence[Entry] = ENTRIES,
  *,
  batch_size: int | None,
  rounds: int,
  minutes: float | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Compiles and times the steps.

  Args:
    entries: what to measure, the most important first.
    batch_size: images on each device; None: the largest power of two, up to `LARGEST_BATCH`, whose
      compiled memory fits (on CPU: 8).
    rounds: how often each step is timed, each time beside one large matrix product.
    minutes: to end in, about; entries that there is no time for are named under `missing`.
    say: called with a line about what is being done.

  Returns:
    `machine`, `rows`, `kernels` (a table by entry), `missing` (reasons by entry).
  """
  start = time.monotonic()
  end = float('inf') if minutes is None else start + 60 * minutes
  missing = {e.name: 'for NVIDIA GPUs only' for e in entries if e.nvidia and not _on_nvidia()}
  entries = [entry for entry in entries if entry.name not in missing]
  machine = describe()
  say(', '.join(f'{key} {value}' for key, value in machine.items()))
  machine['copy_gb_per_second'] = copy_bandwidth() / 1e9
  rows, tables = [], {}
  matmuls: dict[str, Matmul] = {}
  # XLA's CPU backend compiles with all cores as it is.
  count = 1 if jax.default_backend() == 'cpu' else _SIDE_BY_SIDE
  slowest = 0.0
  for wave in (entries[i : i + count] for i in range(0, len(entries), count)):
    begun = time.monotonic()
    if begun + slowest > end:  # the next few will take as long as those before
      missing |= dict.fromkeys((entry.name for entry in wave), 'no time left')
      continue
    for entry, step in zip(wave, _compile(wave, batch_size, say), strict=True):
      if isinstance(step, str):
        missing[entry.name] = step
        continue
      if step.dtype not in matmuls:
        matmuls[step.dtype] = Matmul(step.dtype, step.mesh)
      try:
        row = _row(step, matmuls[step.dtype], rounds, machine)
        rows.append({'name': entry.name, **row})
        say(f'{entry.name}: {row["step_ms"]:.1f} ms, {row["images_per_second"]:.0f} images/s')
        if entry.profiled:  # a failure leaves the row, and is named
          tables[entry.name] = [kernel._asdict() for kernel in kernels.profile(step)]
      except Exception as error:  # such as too little memory; the others are measured without it
        missing[entry.name] = _reason(error)
      step.release()
    gc.collect()
    slowest = max(slowest, time.monotonic() - begun)
  for dtype, matmul in matmuls.items():
    machine[f'matmul_{dtype}_tflops'] = matmul.flops_per_second() / 1e12
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    machine['peak_memory_gb'] = stats['peak_bytes_in_use'] / 1e9
  return {
    'machine': machine,
    'seconds': time.monotonic() - start,
    'rounds': rounds,
    'rows': rows,
    'kernels': tables,
    'missing': missing,
  }


def _on_nvidia() -> bool:
  device = jax.local_devices()[0]
  return device.platform == 'gpu' and 'rocm' not in device.client.platform_version.lower()


def _compile(
  entries: Sequence[Entry], batch_size: int | None, say: Callable[[str], None]
) -> list[TrainingStep | str]:
  """Each entry's step, or why there is none."""
  on_cpu = jax.default_backend() == 'cpu'
  limit = _memory_limit()

  def build(entry: Entry) -> TrainingStep | str:
    try:
      config = cli.config_from_file(f'configs/{_path(entry.config)}')
      config.update_from_flattened_dict(dict(entry.settings))
      if batch_size is not None or on_cpu:
        step = TrainingStep(config, batch_size=batch_size or _CPU_BATCH)
      else:
        step = _largest(config, limit)
    except Exception as error:  # the others are measured without it
      return _reason(error)
    say(
      f'compiled {entry.name}, {step.config.batch_size} images, in {step.compile_seconds:.0f} s, '
      f'{step.memory / 1e9:.1f} GB'
    )
    return step

  with concurrent.futures.ThreadPoolExecutor(len(entries)) as pool:
    return list(pool.map(build, entries))


def _reason(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.splitlines()[0][:200]


def _path(config: str) -> str:
  file, colon, variant = config.partition(':')
  return f'{file}.py{colon}{variant}'


def _largest(config: Any, limit: float) -> TrainingStep:
  """The step with the largest power of two of images whose compiled memory is within `limit`."""
  batch, found = _FIRST_BATCH, None
  while True:
    step = TrainingStep(config, batch_size=batch)
    if step.memory > limit:
      if found is not None or batch == 1:
        return found or step  # one image that does not fit: running it says so
      batch //= 2
      continue
    found = step
    # Temporaries grow with the batch: an estimate of how many images fit, checked by compiling.
    fitting = 2 ** int(np.log2(min(LARGEST_BATCH, batch * limit / step.memory)))
    if fitting <= batch:
      return found
    batch = fitting


def _memory_limit() -> float:
  stats = jax.local_devices()[0].memory_stats() or {}
  return 0.95 * stats.get('bytes_limit', float('inf'))  # the rest: fragmentation, kernels' scratch


def _row(step: TrainingStep, matmul: Matmul, rounds: int, machine: dict) -> dict[str, Any]:
  step.start()
  pairs = [(step.seconds(), matmul.flops_per_second()) for _ in range(rounds)]
  seconds = statistics.median(s for s, _ in pairs)
  rate = statistics.median(r for _, r in pairs)
  devices = step.mesh.size
  floor = step.flops / rate
  if step.traffic is not None and jax.default_backend() != 'cpu':  # whose caches keep most of it
    floor = max(floor, step.traffic / (1e9 * machine['copy_gb_per_second']))
  images = step.config.batch_size
  return {
    'model': step.config.model.name,
    'image_size': list(step.config.image_size),
    'dtype': step.dtype,
    'batch_size': images,
    'step_ms': 1e3 * seconds,
    'step_ms_range': [1e3 * min(s for s, _ in pairs), 1e3 * max(s for s, _ in pairs)],
    'images_per_second': images / seconds,
    'images_per_second_per_device': images / seconds / devices,
    'gflop_per_image': step.flops / images / 1e9,
    'tflops': step.flops / seconds / 1e12,
    'matmul_tflops': rate / 1e12,
    'matmul_share': step.flops / seconds / rate,
    'traffic_gb': None if step.traffic is None else step.traffic / 1e9,
    'roofline_share': floor / seconds,
    'memory_gb': step.memory / 1e9,
    'host_ms': 1e3 * statistics.median(step.dispatch_seconds() for _ in range(5)),
    'compile_seconds': step.compile_seconds,
  }


def copy_bandwidth() -> float:
  """Bytes a second that the first device reads and writes while it copies a large array."""
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', 2**30)
  count = int(min(_COPIED, limit / 8)) // 4
  x = jnp.arange(count, dtype=jnp.float32)
  negate = jax.jit(lambda x: -x)
  negate(x).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    for _ in range(4):
      out = negate(x)
    out.block_until_ready()
    times.append((time.perf_counter() - start) / 4)
  return 2 * x.nbytes / statistics.median(times)


def describe() -> dict[str, Any]:
  """The machine and the versions that decide about speed."""
  device = jax.devices()[0]
  found = {
    'device': f'{jax.device_count()} x {device.device_kind}',
    'date': time.strftime('%Y-%m-%d'),
    'jax': jax.__version__,
    'flax': flax.__version__,
    'python': platform.python_version(),
    'cores': os.cpu_count(),
  }
  if device.platform == 'gpu':
    found['platform'] = ' '.join(device.client.platform_version.split())
    found |= _driver()
  if flags := os.environ.get('XLA_FLAGS'):
    found['XLA_FLAGS'] = flags
  return found


def _driver() -> dict[str, str]:
  query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
  try:
    answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
  except (OSError, subprocess.SubprocessError):
    return {}
  return {'driver': answer.stdout.splitlines()[0].strip()} if answer.stdout else {}
