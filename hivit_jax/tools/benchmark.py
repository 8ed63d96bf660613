"""How fast a config's training step is, as a share of what the machine's matrix products reach.

  python -m hivit_jax.tools.benchmark --config=configs/mae_hivit_b.py --batch_size=8
  python -m hivit_jax.tools.benchmark --data

The first measures the whole step (gradient, optimizer) on synthetic images; the second the input
pipelines of pretraining and of supervised training next to bare decoding. Steps and the reference
product take turns, so that a machine with other work slows both alike; what is reported is the
median of the pairs.
"""

import json
import resource
import statistics
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from hivit_jax import cli
from hivit_jax.errors import UserError
from hivit_jax.tools.flops import matmul_flops
from hivit_jax.train import build, host_memory, sharding, step
from hivit_jax.train.logging import setup_logging

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config of the step to measure.')
_DATA = flags.DEFINE_bool('data', False, 'Measure the input pipelines instead.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'Images a step on each device.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 10, 'Steps to measure.', lower_bound=1)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object instead of text.')

_MATMUL_SIDE = {'cpu': 4096}  # elsewhere 8192: beyond these the rate does not change any more
_MATMUL_SECONDS = 0.1  # a measurement of the reference takes at least so long
_STEP_SECONDS = 0.1  # and one of the step


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise UserError(f'unexpected argument "{argv[1]}"')
  if _CONFIG.value is not None:
    host_memory.keep_freed_memory(one_arena=build.is_large(_CONFIG.value))
  setup_logging()
  if _DATA.value:
    from hivit_jax.data import benchmark

    benchmark.main(as_json=_JSON.value)
    return
  if _CONFIG.value is None:
    raise UserError('what to measure? --config=configs/mae_hivit_b.py, or --data for the input')
  report = measure_step(_CONFIG.value, batch_size=_BATCH_SIZE.value, repeats=_STEPS.value)
  print(json.dumps(report) if _JSON.value else format_report(report))


def measure_step(
  config: ml_collections.ConfigDict, *, batch_size: int, repeats: int
) -> dict[str, Any]:
  """Compiles and times the training step of a config.

  Args:
    config: see configs/base.py.
    batch_size: images on each device.
    repeats: measurements; each is as many steps as take `_STEP_SECONDS`.

  Returns:
    Numbers by name, units in the names; what each means is in docs/benchmarks.md.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  config = config.copy_and_resolve_references()
  config.batch_size = batch_size * mesh.size
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
  dtype = build.compute_dtype(config)
  create = build.model_creator(config)
  graphdef, optimizer, abstract = step.abstract_state(create, build.optimizer(config), mesh)
  train_step = step.make_train_step(
    graphdef,
    build.task(config),
    optimizer,
    build.schedule(config),
    epochs_per_step=1e-3,
    seed=config.seed,
    abstract=abstract,
    accumulate_steps=config.accumulate_steps,
    compiler_options=sharding.compiler_options(mesh),
  )
  batch = _synthetic_batch(config, mesh)
  state = step.init_state(create, optimizer, abstract)

  start = time.perf_counter()
  lowered = train_step.lower(state, batch)
  trace_seconds = time.perf_counter() - start
  start = time.perf_counter()
  compiled = lowered.compile()
  compile_seconds = time.perf_counter() - start
  flops = matmul_flops(train_step, abstract, batch)

  def run(count: int) -> float:
    """Seconds of `count` steps."""
    nonlocal state
    start = time.perf_counter()
    for _ in range(count):
      state, metrics = compiled(state, batch)
    metrics['loss'].block_until_ready()
    return time.perf_counter() - start

  matmul = _Matmul(dtype, mesh)
  run(1)
  count = max(1, round(_STEP_SECONDS / run(1)))
  pairs = [(run(count) / count, matmul.flops_per_second()) for _ in range(repeats)]
  seconds = statistics.median(s for s, _ in pairs)
  shares = sorted(flops / s / rate for s, rate in pairs)
  memory = compiled.memory_analysis()
  device = jax.devices()[0]
  return {
    'model': config.model.name,
    'image_size': list(build.image_size(config)),
    'device': f'{mesh.size} x {device.device_kind}',
    'jax': jax.__version__,
    'dtype': dtype,
    'batch_size': config.batch_size,
    'trace_seconds': trace_seconds,
    'compile_seconds': compile_seconds,
    'step_ms': 1e3 * seconds,
    'step_ms_fastest': 1e3 * min(s for s, _ in pairs),
    'images_per_second': config.batch_size / seconds,
    'gflop_per_image': flops / config.batch_size / 1e9,
    'gflops': flops / seconds / 1e9,
    'matmul_gflops': statistics.median(rate for _, rate in pairs) / 1e9,
    'matmul_share': statistics.median(shares),
    'matmul_share_range': [shares[0], shares[-1]],
    'step_memory_mb': (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
    'peak_memory_mb': _peak_memory(device) / 1e6,
    'host_ms_per_step': 1e3 * _host_seconds(config, mesh, repeats=max(20, repeats)),
  }


def _synthetic_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, jax.Array]:
  shape = (config.batch_size // jax.process_count(), *build.image_size(config), config.channels)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  labels = np.zeros(shape[0], np.int32)
  return sharding.put_batch({'image': images, 'label': labels}, mesh)


class _Matmul:
  """A large square product on every device at once, in the dtype of the step."""

  def __init__(self, dtype: str, mesh: Mesh):
    side = _MATMUL_SIDE.get(jax.default_backend(), 8192)
    self._flops = 2 * side**3 * mesh.size
    # Random numbers: on zeros, accelerators clock higher than on anything real.
    a = jax.random.normal(jax.random.key(0), (mesh.size, side, side), dtype)
    self._a = jax.device_put(a, sharding.batch_sharding(mesh))
    self._product = jax.jit(jax.vmap(lambda x, y: x @ y))
    self._b = self._product(self._a, self._a)
    self._count = 1
    self._count = max(1, round(_MATMUL_SECONDS / self._seconds()))

  def _seconds(self) -> float:
    # Not the first one: after a step the caches and the kernel's pages are the step's.
    self._product(self._a, self._a).block_until_ready()
    start = time.perf_counter()
    for _ in range(self._count):
      out = self._product(self._a, self._a)
    out.block_until_ready()
    return time.perf_counter() - start

  def flops_per_second(self) -> float:
    return self._flops * self._count / self._seconds()


def _host_seconds(config: ml_collections.ConfigDict, mesh: Mesh, repeats: int) -> float:
  """Time that the host needs to start a step.

  Measured on the same model made narrow, with one image a device, so that the device is done before
  the host is: what is left is flattening the state's tree, checking it, and starting the program.
  """
  config = config.copy_and_resolve_references()
  config.batch_size = mesh.size * config.accumulate_steps
  config.image_size = (32, 32)
  config.model.update(embed_dim=16, num_heads=1)
  if config.task == 'mae':
    config.model.update(decoder_embed_dim=16, decoder_num_heads=1)
  create = build.model_creator(config)
  graphdef, optimizer, abstract = step.abstract_state(create, build.optimizer(config), mesh)
  train_step = step.make_train_step(
    graphdef,
    build.task(config),
    optimizer,
    build.schedule(config),
    epochs_per_step=1e-3,
    seed=0,
    abstract=abstract,
    accumulate_steps=config.accumulate_steps,
    compiler_options=sharding.compiler_options(mesh),
  )
  state = step.init_state(create, optimizer, abstract)
  batch = _synthetic_batch(config, mesh)
  times = []
  for _ in range(repeats + 2):
    start = time.perf_counter()
    state, metrics = train_step(state, batch)
    times.append(time.perf_counter() - start)
    metrics['loss'].block_until_ready()
  return statistics.median(times[2:])


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
      f'host             {r["host_ms_per_step"]:8.2f} ms/step to start a step',
    )
  )


if __name__ == '__main__':
  cli.run(main)
