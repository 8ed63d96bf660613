"""What a training step needs on devices that need not be there.

The step is compiled as training would, for TPUs by libtpu, for GPUs by JAX's CUDA plugin; nothing
is allocated. What the numbers mean is in docs/guide/scaling.md.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies

from hivit_jax.errors import UserError
from hivit_jax.planning import roofline
from hivit_jax.planning.collectives import collectives
from hivit_jax.planning.flops import matmul_bytes, matmul_flops
from hivit_jax.train import assemble, hints, sharding, synthetic, validate

# libtpu asks the cloud where it runs, complains where that is none, and wants to be alone.
_LIBTPU_ALONE = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


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
    if jax.config.values['jax_num_cpu_devices'] != int(shape):  # of a plan before
      jax.config.update('jax_num_cpu_devices', int(shape))
    return jax.devices('cpu')
  chip = roofline.CHIPS.get(kind)
  sides = [int(side) for side in re.findall('[1-9][0-9]*', shape)]
  if chip is None or not sides or 'x'.join(map(str, sides)) != shape:
    raise UserError(
      f'--topology={topology}: expected a kind ({", ".join(roofline.CHIPS)}) and a shape, such as '
      'v5e:4x4, v4:2x2x2 or h200:8, or cpu:8'
    )
  if math.prod(sides) > chip.pod or (chip.gpu and len(sides) > 1):
    whole = 'a number of GPUs in one machine' if chip.gpu else 'a slice'
    raise UserError(
      f'--topology={topology}: expected {whole}, of {chip.pod} {kind} at most; several have a '
      'slower network between them, which this planner does not know'
    )
  compilers = ('jax_cuda12_plugin', 'jax_cuda13_plugin') if chip.gpu else ('libtpu',)
  if not any(map(importlib.util.find_spec, compilers)):
    extra = 'cuda13' if chip.gpu else 'tpu'
    raise UserError(
      f'--topology={topology} needs a compiler: pip install "jax[{extra}]"; or, for counts without '
      'times, --topology=cpu:8'
    )
  jax.config.update('jax_platforms', 'cpu')  # accelerators in this machine are left alone
  if chip.gpu:
    described = {'target_config': _describe(chip, chip.gpu), 'topology': f'1x1x{sides[0]}'}
    return topologies.get_topology_desc('', 'cuda', **described).devices
  for variable, value in _LIBTPU_ALONE.items():
    os.environ.setdefault(variable, value)
  # Both cores of a v4 chip are one device.
  options: dict[str, Any] = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  if math.prod(sides) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return topologies.get_topology_desc(topology, 'tpu', **options).devices
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    raise UserError(
      f'--topology={topology}: libtpu does not accept it: {str(error).splitlines()[0]}'
    ) from error


def _describe(chip: roofline.Chip, gpu: roofline.Gpu) -> str:
  """XLA's stream_executor.GpuTargetConfigProto; first what is the same for all of these chips."""
  return f"""
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
      l2_cache_size: {gpu.l2} shared_memory_per_core: {gpu.shared_memory[0]}
      shared_memory_per_block_optin: {gpu.shared_memory[1]}
      memory_bandwidth: {chip.hbm_bandwidth:.0f} device_memory_size: {chip.hbm:.0f}
      name: "{gpu.name}"
    }}
    platform_name: "CUDA" device_description_str: "{gpu.name}"
    dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
  """


def plan_for(
  config: ml_collections.ConfigDict, topology: str, *, batch_size: int | None = None
) -> dict[str, Any]:
  """Plans the training step of a config for a topology: what `tools.plan` reports.

  Args:
    config: see configs/base.py.
    topology: see `find_devices`.
    batch_size: images of a step on each device; None: the config's, over all devices.

  Returns:
    See `plan`; in addition `topology`.

  Raises:
    UserError: see `find_devices` and `plan`.
  """
  config, devices = config.copy_and_resolve_references(), find_devices(topology)
  if batch_size is not None:
    used = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices).size
    config.batch_size = batch_size * used
  chip = roofline.CHIPS.get(topology.partition(':')[0])
  return {'topology': topology} | plan(config, devices, chip)


def plan(
  config: ml_collections.ConfigDict, devices: Sequence[Any], chip: roofline.Chip | None = None
) -> dict[str, Any]:
  """Compiles the training step of a config for devices and returns what it needs.

  Of several canvases (`config.detect.buckets`) the step on the largest one is compiled.

  Args:
    config: see configs/base.py.
    devices: from `find_devices`.
    chip: what is known of the rates of one, for an estimate of time.

  Returns:
    Numbers by name: bytes, operations and seconds, of one step on each device. If the program does
    not fit, `refusal` is the compiler's message (None: none), `helps` says how to need
    less, and its numbers are missing.

  Raises:
    UserError: a setting makes no sense, or does not fit the devices.
  """
  config = config.copy_and_resolve_references()
  validate.check(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
  config.model.dtype = assemble.compute_dtype(config, devices[0].platform)
  training = assemble.training(config, mesh)
  abstract, train_step = training.abstract, training.train_step
  batch = synthetic.abstract_batch(config, mesh)
  report = {
    'model': config.model.name,
    'task': config.task,
    'image_size': list(synthetic.canvas(config)),
    'dtype': config.model.dtype,
    'attention': assemble.attention(config, devices),
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
  state = sum(report['memory'][part] for part in ('parameters', 'optimizer', 'average'))
  # The state is read and written once, if nothing else is.
  report['memory_traffic'] = matmul_bytes(train_step, abstract, batch) / mesh.size + 2 * state
  helps = hints.for_memory(config, batches=())
  start = time.perf_counter()
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells Pallas for which GPU
      compiled = train_step.lower(abstract, batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return report | {'fits': False, 'refusal': str(error).splitlines()[0], 'helps': helps}
  report |= {'fits': True, 'compile_seconds': time.perf_counter() - start}
  report['memory'] |= _program_memory(compiled, sum(report['memory'].values()))
  if chip and report['memory']['total'] > chip.hbm:  # XLA for GPUs refuses nothing
    return report | {'fits': False, 'refusal': None, 'helps': helps}
  report['collectives'] = collectives(compiled.as_text(), mesh.size)
  if chip:
    report['estimate'] = roofline.estimate(
      chip,
      flops=report['matmul_flops'],
      traffic=report['memory_traffic'],
      sent=sum(row['sent'] for row in report['collectives']),
    )
  return report


def _local_bytes(tree: Any) -> int:
  """Bytes of a tree's arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _program_memory(compiled: jax.stages.Compiled, known: int) -> dict[str, int]:
  m: Any = compiled.memory_analysis()
  # The new state takes the place of the old one.
  arrays = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
  return {
    'temporaries': m.temp_size_in_bytes,
    'program': m.generated_code_size_in_bytes,
    'padding': arrays - known,
    'total': arrays + m.temp_size_in_bytes + m.generated_code_size_in_bytes,
  }
