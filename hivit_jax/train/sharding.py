"""Devices as a mesh, and what is placed where."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hivit_jax.errors import UserError, flag
from hivit_jax.train import rules

AXES = ('data', 'fsdp')

# What of the training state is split over `fsdp`. Patterns as in `rules`, of paths such as
# 'params/blocks/0/mlp/fc1/kernel'; the optimizer's numbers for a parameter go with it.
_RULES: rules.Rules = (
  (r'(.*/)?kernel', 'split'),
  (r'(.*/)?(bias|scale|gamma_[12]|mean|var|relative_position_bias_table)', 'whole'),
  (r'(.*/)?hogs/simple_weights', 'whole'),
  (r'(.*/)?(absolute_pos_embed|pos_embed|decoder_pos_embed|cls_token|mask_token)', 'whole'),
  (r'step|.*/count', 'whole'),
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh (data, fsdp) over the devices of all processes.

  Both axes split the batch; `fsdp` splits the training state as well, see `state_shardings`. The
  devices of a process stand together, in the order of the processes: so the examples that a process
  loads are those that its devices compute. `jax.make_mesh` does not keep them together on TPUs.

  Args:
    data: devices with copies of the training state, or of each part of it; -1: all / fsdp.
    fsdp: devices that share one copy.
    devices: to use; None: all.

  Raises:
    UserError: more devices than exist, or only some of them in a run of several processes.
  """
  devices = sorted(devices or jax.devices(), key=lambda device: device.process_index)
  available = len(devices)
  if data == -1 and fsdp > 0 and available % fsdp == 0:
    data = available // fsdp
  partial = devices[-1].process_index > 0 and data * fsdp != available
  if data < 1 or fsdp < 1 or data * fsdp > available or partial:
    raise UserError(
      f'config.mesh.data={data}, config.mesh.fsdp={fsdp}: there are {available} devices; '
      '--config.mesh.data=-1 uses all of them, and --config.mesh.fsdp must divide their number'
    )
  return Mesh(np.asarray(devices[: data * fsdp]).reshape(data, fsdp), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """First axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """Where each leaf of a training state lies: the same everywhere, or split over `fsdp`.

  A leaf that is split is so in the first of its dimensions that the axis divides; one without such
  a dimension is whole on every device.

  Args:
    state: tree of arrays or shapes; see `step.State`.
    mesh: from `make_mesh`.

  Returns:
    A tree of `NamedSharding`s of the same structure.

  Raises:
    UserError: the mesh has an axis `fsdp` that divides no leaf.
  """
  labels = rules.apply_rules(_RULES, state)
  fsdp = mesh.shape['fsdp']

  def place(leaf: Any, label: str) -> NamedSharding:
    if label == 'split' and fsdp > 1:
      for axis, size in enumerate(leaf.shape):
        if size % fsdp == 0:
          return NamedSharding(mesh, PartitionSpec(*(None,) * axis, 'fsdp'))
    return replicated(mesh)

  shardings = jax.tree.map(place, state, labels)
  if fsdp > 1 and all(s.is_fully_replicated for s in jax.tree.leaves(shardings)):
    raise UserError(
      f"config.mesh.fsdp={fsdp} divides none of the parameters' dimensions; --config.mesh.fsdp=1 "
      'splits nothing'
    )
  return shardings


def put(tree: Any, shardings: Any) -> Any:
  """Arrays that are the same in every process -> global arrays."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def place(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    values = np.asarray(array)
    # Unlike `device_put`, which compares the processes' values, no communication.
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

  return jax.tree.map(place, tree, shardings)


def whole(tree: Any, mesh: Mesh) -> Any:
  """Global arrays, split or not, made whole on every device; all processes must call it."""
  if all(x.sharding.is_fully_replicated for x in jax.tree.leaves(tree)):
    return tree
  return _gatherer(mesh)(tree)


@functools.cache
def _gatherer(mesh: Mesh) -> Any:
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def use_whole(params: Any, shardings: Any) -> Any:
  """Inside a jitted function: parameters that are split over devices, whole on each of them.

  Args:
    params: tree of arrays.
    shardings: tree of `NamedSharding`s of the same structure; None: nothing is split.
  """
  return _constrain(params, shardings, lambda sharding: replicated(sharding.mesh))


def keep_parts(gradients: Any, shardings: Any) -> Any:
  """Inside a jitted function: for each gradient, a device keeps the part it has of the parameter.

  Each device asks for its part of the sum only: a reduce-scatter, where the compiler has one.
  Arguments are as for `use_whole`.
  """
  return _constrain(gradients, shardings, lambda sharding: sharding)


def _constrain(tree: Any, shardings: Any, place: Callable) -> Any:
  def constrain(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_replicated:
      return x
    return jax.lax.with_sharding_constraint(x, place(sharding))

  return tree if shardings is None else jax.tree.map(constrain, tree, shardings)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate_steps: int = 1, key='batch_size'):
  """UserError unless the batch splits evenly over devices and accumulation steps."""
  parts = mesh.size * accumulate_steps
  if batch_size % parts:
    below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
    near = ' or '.join(flag(key, size) for size in dict.fromkeys((below, above)) if size > 0)
    by = f'{mesh.size} devices' + (
      f' x {accumulate_steps} accumulation steps' if accumulate_steps > 1 else ''
    )
    raise UserError(f'config.{key}={batch_size} is not divisible by {by}; try {near}')


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's part of a batch -> global arrays over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
  }


def fetch(array: jax.Array) -> np.ndarray:
  """A global array as numpy, on every process."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def total(counts: np.ndarray) -> np.ndarray:
  """The sum over all processes of int64 counts, on every process."""
  if jax.process_count() == 1:
    return counts
  # In two halves, because JAX has 32 bits.
  halves = np.stack(np.divmod(counts, 1 << 24)).astype(np.int32)
  high, low = multihost_utils.process_allgather(halves).astype(np.int64).sum(axis=0)
  return (high << 24) + low


def local(tree: Any) -> Any:
  """Replicated global arrays as this process's own, for work that it does alone."""
  return jax.tree.map(lambda x: x.addressable_data(0), tree)
