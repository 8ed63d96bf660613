"""Training steps and reference products, compiled and timed on synthetic images."""

import time

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from hivit_jax.planning.flops import matmul_flops
from hivit_jax.train import assemble, memory, sharding, step

_STEP_SECONDS = 0.1  # a measurement of a step takes at least so long
_MATMUL_SECONDS = 0.1  # and one of the reference
_MATMUL_SIDE = {'cpu': 4096}  # elsewhere 8192: beyond these the rate does not change any more


class TrainingStep:
  """The training step of a config: gradient, optimizer, metrics.

  Attributes:
    config: of the step, `batch_size` over all devices.
    dtype: of the computation.
    flops: operations in the matrix products of a step.
    trace_seconds, compile_seconds: what it took to build.
    memory: bytes on a device: state and temporaries.
  """

  def __init__(self, config: ml_collections.ConfigDict, *, batch_size: int):
    """Compiles it and makes one step.

    Args:
      config: see configs/base.py.
      batch_size: images on each device.
    """
    assemble.task(config)  # first: it has something to say about the model
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    config = config.copy_and_resolve_references()
    config.batch_size = batch_size * mesh.size
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    self.config, self.mesh, self.dtype = config, mesh, assemble.compute_dtype(config)
    size = assemble.image_size(config)
    memory.check_images(mesh, size, config.channels, config.batch_size)
    training = assemble.training(config, mesh)
    memory.check_state(mesh, training.abstract)
    self._step = training.train_step
    self._batch = _synthetic_batch(config, mesh)
    self._state = step.init_state(
      assemble.model_creator(config), training.optimizer, training.abstract
    )
    start = time.perf_counter()
    lowered = self._step.lower(self._state, self._batch)
    traced = time.perf_counter()
    self._compiled = lowered.compile()
    self.trace_seconds, self.compile_seconds = traced - start, time.perf_counter() - traced
    self.flops = matmul_flops(self._step, training.abstract, self._batch)
    analysis = self._compiled.memory_analysis()
    self.memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    self._run(1)
    self._count = max(1, round(_STEP_SECONDS / self._run(1)))

  def _run(self, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
      self._state, metrics = self._compiled(self._state, self._batch)
    metrics['loss'].block_until_ready()
    return time.perf_counter() - start

  def seconds(self) -> float:
    """Time of a step, from as many as take `_STEP_SECONDS`."""
    return self._run(self._count) / self._count

  def host_seconds(self) -> float:
    """Time until a step is started as training does it, the device being idle.

    The first call compiles once more.
    """
    start = time.perf_counter()
    self._state, metrics = self._step(self._state, self._batch)
    seconds = time.perf_counter() - start
    metrics['loss'].block_until_ready()
    return seconds


def _synthetic_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, jax.Array]:
  shape = (config.batch_size // jax.process_count(), *assemble.image_size(config), config.channels)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  labels = np.zeros(shape[0], np.int32)
  return sharding.put_batch({'image': images, 'label': labels}, mesh)


class Matmul:
  """A large square product on every device at once, in the dtype of the step."""

  def __init__(self, dtype: str, mesh: Mesh):
    side = _MATMUL_SIDE.get(jax.default_backend(), 8192)
    self._flops = 2 * side**3 * mesh.size
    # Random numbers: on zeros, accelerators clock higher than on anything real.
    a = jax.random.normal(jax.random.key(0), (mesh.size, side, side), dtype)
    self._a = jax.device_put(a, sharding.batch_sharding(mesh))
    self._product = jax.jit(jax.vmap(lambda x, y: x @ y))
    self._product(self._a, self._a).block_until_ready()
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
    """Rate of the product, operations a second."""
    return self._flops * self._count / self._seconds()
