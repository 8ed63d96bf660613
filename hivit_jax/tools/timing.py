"""Training steps and reference products, compiled and timed on synthetic images."""

import threading
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hivit_jax.planning.flops import matmul_flops
from hivit_jax.runtime import memory
from hivit_jax.train import assemble, sharding, step, synthetic

_STEP_SECONDS = 0.2  # minimum duration of one measurement
_MATMUL_SECONDS = 0.1  # and one of the reference
_TRACING = threading.Lock()  # Flax keeps what it traces in globals
_MATMUL_SIDE = {'cpu': 2048}  # elsewhere 8192: beyond these the rate does not change any more


class TrainingStep:
  """The training step of a config: gradient, optimizer, metrics.

  Constructing it compiles the step and allocates nothing on the devices; the state and a batch of
  random images are made by `start`.

  Attributes:
    config: of the step, `batch_size` over all devices.
    dtype: of the computation.
    flops: operations in the matrix products of a step.
    trace_seconds, compile_seconds: what it took to build.
    memory: bytes on a device while the step runs: state, batch, temporaries.
    traffic: bytes that a device reads and writes in a step, as its compiler counts; None: unknown.
  """

  def __init__(self, config: ml_collections.ConfigDict, *, batch_size: int):
    """Compiles the step. Safe to call from several threads.

    Args:
      config: see configs/base.py.
      batch_size: images on each device.
    """
    with _TRACING:
      assemble.check_model(config)  # first: it has something to say
      mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
      config = config.copy_and_resolve_references()
      config.batch_size = batch_size * mesh.size
      sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
      self.config, self.mesh, self.dtype = config, mesh, assemble.compute_dtype(config)
      memory.check_images(mesh, synthetic.canvas(config), config.channels, config.batch_size)
      training, batch = assemble.training(config, mesh), synthetic.abstract_batch(config, mesh)
      memory.check_state(mesh, training.abstract)
      self._training, self._step = training, training.train_step
      start = time.perf_counter()
      traced = self._step.trace(training.abstract, batch)
      lowered = traced.lower()
      self.trace_seconds = time.perf_counter() - start
      self.flops = matmul_flops(traced)
    start = time.perf_counter()
    self._compiled = lowered.compile()
    self.compile_seconds = time.perf_counter() - start
    self.memory = _bytes_in_use(self._compiled.memory_analysis())
    self.traffic = _traffic(self._compiled)
    self._state = self._batch = None
    self._count = 1

  def start(self) -> None:
    """Allocates state and batch, and runs the step twice."""
    self._batch = synthetic.batch(self.config, self.mesh)
    training = self._training
    self._state = step.init_state(
      lambda: _random_model(training), training.optimizer, training.abstract
    )
    self.run(1)
    self._count = max(1, round(_STEP_SECONDS / self.run(1)))

  def release(self) -> None:
    """Frees what `start` has allocated."""
    self._state = self._batch = None

  def run(self, count: int) -> float:
    """Seconds that so many steps take, started one after the other."""
    start = time.perf_counter()
    for _ in range(count):
      self._state, metrics = self._compiled(self._state, self._batch)
    metrics['loss'].block_until_ready()
    return time.perf_counter() - start

  def seconds(self) -> float:
    """Time of a step while the device always has the next one waiting, as in training.

    The first of several short steps is left out: an idle device waits until the host has started
    it. Starts what is not started.
    """
    if self._state is None:
      self.start()
    if self._count == 1:
      return self.run(1)
    first = self.run(1)
    return (self.run(1 + self._count) - first) / self._count

  def host_seconds(self) -> float:
    """Time to start a step as training does it, on an idle device.

    The first call compiles once more.
    """
    return self._start_seconds(self._step)

  def dispatch_seconds(self) -> float:
    """Time to start the compiled step, on an idle device."""
    return self._start_seconds(self._compiled)

  def _start_seconds(self, function: Any) -> float:
    if self._state is None:
      self.start()
    start = time.perf_counter()
    self._state, metrics = function(self._state, self._batch)
    seconds = time.perf_counter() - start
    metrics['loss'].block_until_ready()
    return seconds


def _random_model(training: assemble.Training) -> nnx.Module:
  """A model with random parameters of the usual scale, made faster than by initialisation."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: (rng.random(leaf.shape, np.float32) - 0.5) * 0.07, training.abstract['params']
  )
  return nnx.merge(training.graphdef, params)


def _bytes_in_use(analysis: Any) -> int:
  new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + max(0, new)


def _traffic(compiled: Any) -> float | None:
  costs = compiled.cost_analysis() or {}
  return costs.get('bytes accessed')


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
