"""What a config's training step will need on devices that need not be there.

The step is compiled as training would, for TPUs by libtpu, for GPUs by JAX's CUDA plugin; nothing
is allocated. What the numbers mean is in docs/scaling.md.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh

from hivit_jax.errors import UserError
from hivit_jax.planning import costs, hlo, roofline
from hivit_jax.planning.collectives import collectives
from hivit_jax.planning.flops import matmul_flops
from hivit_jax.train import assemble, sharding, validate

_GIB = 2**30


def find_devices(topology: str) -> Sequence[Any]:
  """The devices of a topology; they need not exist.

  Args:
    topology: a kind in `roofline.CHIPS` and the shape of a slice or number of GPUs, such as v5e:4x4
      or h200:8, or cpu and a number. The latter works before JAX has looked for devices, and only
      then.

  Raises:
    UserError: there is no such topology, or no compiler for it.
  """
  kind, _, shape = topology.partition(':')
  if kind == 'cpu' and re.fullmatch('[1-9][0-9]*', shape):
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', int(shape))
    return jax.devices('cpu')
  sides = [int(side) for side in re.findall('[1-9][0-9]*', shape)]
  if kind not in roofline.CHIPS or not sides or 'x'.join(map(str, sides)) != shape:
    known = ', '.join(roofline.CHIPS)
    raise UserError(
      f'--topology={topology}: expected a kind ({known}) and a shape, such as v5e:4x4, v4:2x2x2 '
      'or h200:8, or cpu:8'
    )
  if gpu := roofline.CHIPS[kind].gpu:
    return _find_gpus(topology, roofline.CHIPS[kind], gpu, sides)
  pod = roofline.CHIPS[kind].pod
  if math.prod(sides) > pod:
    raise UserError(
      f'--topology={topology}: the largest slice of {kind} has {pod} chips; more are several '
      'slices in a slower network, which this does not know'
    )
  if not importlib.util.find_spec('libtpu'):
    raise UserError(
      f'--topology={topology} takes the TPU compiler: pip install "jax[tpu]"; or, for counts '
      'without times, --topology=cpu:8'
    )
  # libtpu asks the cloud where it runs, complains where that is none, and wants to be alone.
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
  ):
    os.environ.setdefault(name, value)
  jax.config.update('jax_platforms', 'cpu')  # a TPU in this machine is left alone
  options: dict[str, Any] = {}
  if kind == 'v4':
    options['chip_config_name'] = 'megacore'  # both cores of a chip as one device
  if math.prod(sides) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return topologies.get_topology_desc(topology, 'tpu', **options).devices
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    raise UserError(
      f'--topology={topology}: libtpu does not accept it: {str(error).splitlines()[0]}'
    ) from error


def _find_gpus(
  topology: str, chip: roofline.Chip, gpu: roofline.Gpu, sides: list[int]
) -> Sequence[Any]:
  if len(sides) > 1 or sides[0] > chip.pod:
    raise UserError(
      f'--topology={topology}: a number of GPUs in one machine, 1 to {chip.pod}; more are several '
      'machines in a slower network, which this does not know'
    )
  if not any(importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13)):
    raise UserError(
      f'--topology={topology} takes the CUDA compiler: pip install "jax[cuda12]"; or, for '
      'counts without times, --topology=cpu:8'
    )
  jax.config.update('jax_platforms', 'cpu')  # a GPU in this machine is left alone
  shared, for_block = gpu.shared_memory
  # stream_executor.GpuTargetConfigProto of XLA; what is the same for all of these chips first.
  description = f"""
    gpu_device_info {{
      threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      shared_memory_per_block: 49152
      driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
      dnn_version: "9.10.0"
      cuda_compute_capability {{ major: {gpu.capability} }}
      core_count: {gpu.cores} clock_rate_ghz: {gpu.clock} fpus_per_core: {gpu.float32_units}
      l2_cache_size: {gpu.l2}
      shared_memory_per_core: {shared} shared_memory_per_block_optin: {for_block}
      memory_bandwidth: {chip.hbm_bandwidth:.0f} device_memory_size: {chip.hbm:.0f}
      name: "{gpu.name}"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 12 minor: 8 }}
    device_description_str: "{gpu.name}"
  """
  shape = f'1x1x{sides[0]}'
  return topologies.get_topology_desc('', 'cuda', target_config=description, topology=shape).devices


def plan(
  config: ml_collections.ConfigDict, devices: Sequence[Any], chip: roofline.Chip | None = None
) -> dict[str, Any]:
  """Compiles the training step of a config for devices and tells what it needs.

  Args:
    config: see configs/base.py.
    devices: from `find_devices`.
    chip: what is known of the rates of one, for an estimate of time.

  Returns:
    Numbers by name: bytes, operations and seconds, of one step on each device. If the program does
    not fit, what the compiler says, and only those numbers that do not need it.

  Raises:
    UserError: a setting that does not make sense, or does not fit the devices.
  """
  config = config.copy_and_resolve_references()
  validate.check(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
  config.model.dtype = assemble.compute_dtype(config, devices[0].platform)
  training = assemble.training(config, mesh)
  abstract, train_step = training.abstract, training.train_step
  batch = _abstract_batch(config, mesh)
  report = {
    'model': config.model.name,
    'task': config.task,
    'image_size': list(assemble.image_size(config)),
    'dtype': config.model.dtype,
    'attention': assemble.attention(config, devices[0]),
    'batch_size': config.batch_size,
    'devices': mesh.size,
    'device_kind': devices[0].device_kind,
    'mesh': dict(mesh.shape),
    'jax': jax.__version__,
    'hbm': chip and chip.hbm,
    'memory': {
      'parameters': _local_bytes(abstract['params']),
      'optimizer': _local_bytes(abstract['opt_state']),
      'average': _local_bytes(abstract.get('ema', {})),
      'batch': _local_bytes(batch),
    },
    'matmul_flops': matmul_flops(train_step, abstract, batch) / mesh.size,
  }
  start = time.perf_counter()
  try:
    compiled = train_step.lower(abstract, batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return report | {'fits': False, 'refusal': str(error).splitlines()[0]}
  report |= {'fits': True, 'compile_seconds': time.perf_counter() - start}
  report['memory'] |= _program_memory(compiled, sum(report['memory'].values()))
  if chip and report['memory']['total'] > chip.hbm:  # XLA for GPUs refuses nothing
    return report | {'fits': False, 'refusal': share(report)}
  program = hlo.Program(compiled.as_text())
  cycles, uncounted = costs.core_cycles(program)
  report |= {
    'compiled_flops': (compiled.cost_analysis() or {}).get('flops', 0.0),
    'memory_traffic': costs.memory_traffic(program),
    'core_cycles': cycles,
    'uncounted_instructions': uncounted,
    'collectives': _collectives(program, mesh),
  }
  if chip:
    report['estimate'] = roofline.estimate(
      chip,
      flops=report['matmul_flops'],
      traffic=report['memory_traffic'],
      sent=sum(row['sent'] for row in report['collectives']),
      schedule=_schedule(program, chip, cycles),
    )
  return report


def _schedule(program: hlo.Program, chip: roofline.Chip, cycles: int) -> float | None:
  """Seconds: what the compiler expects, or the sum of what a GPU's kernels need at least."""
  if chip.gpu:
    return costs.kernel_seconds(program, chip.flops, chip.hbm_bandwidth)
  return cycles / chip.clock if cycles and chip.clock else None


def _abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
  place = sharding.batch_sharding(mesh)
  images = (config.batch_size, *assemble.image_size(config), config.channels)
  return {
    'image': jax.ShapeDtypeStruct(images, jnp.uint8, sharding=place),
    'label': jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=place),
  }


def _local_bytes(tree: Any) -> int:
  """Bytes of a tree's arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _program_memory(compiled: jax.stages.Compiled, known: int) -> dict[str, int]:
  m: Any = compiled.memory_analysis()
  # Without the new state, which takes the place of the old one.
  results = m.output_size_in_bytes - m.alias_size_in_bytes
  total = m.argument_size_in_bytes + results + m.temp_size_in_bytes + m.generated_code_size_in_bytes
  return {
    'temporaries': m.temp_size_in_bytes,
    'program': m.generated_code_size_in_bytes,
    'padding': m.argument_size_in_bytes - known + results,
    'total': total,
  }


def _collectives(program: hlo.Program, mesh: Mesh) -> list[dict[str, Any]]:
  """Totals of a step by kind and group."""
  totals: dict[tuple, dict[str, Any]] = {}
  for c in collectives(program, mesh.size):
    axes = c.axes(mesh.shape)
    members = math.prod(mesh.shape[axis] for axis in axes)
    row = totals.setdefault(
      (c.kind, axes),
      {'kind': c.kind, 'axes': axes, 'devices': members, 'count': 0, 'bytes': 0, 'sent': 0.0}
      | {'complete': True},
    )
    times = 1 if c.count is None else c.count
    row['count'] += times
    row['bytes'] += times * c.size
    row['sent'] += times * c.sent
    row['complete'] &= c.count is not None
  return sorted(totals.values(), key=lambda row: -row['sent'])


def share(r: dict[str, Any]) -> str:
  """The memory that the program of a report takes, of that of its device."""
  return f'{r["memory"]["total"] / _GIB:.2f} of {r["hbm"] / _GIB:.2f} GiB'
