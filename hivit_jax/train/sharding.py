"""Devices as a mesh, and what lies where on it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hivit_jax.errors import UserError


def make_mesh(data: int = -1) -> Mesh:
  """A mesh with one axis, `data`, over the devices of all processes.

  Args:
    data: devices that split the batch; -1 for all.

  Raises:
    UserError: more devices than there are, or a part of them in a run of several processes.
  """
  available = jax.device_count()
  data = available if data == -1 else data
  if not 0 < data <= available or (jax.process_count() > 1 and data != available):
    raise UserError(f'config.mesh.data={data}: there are {available} devices; -1 takes all of them')
  return jax.make_mesh(
    (data,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:data]
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """First axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """Options for the compilation of training steps, by the mesh's platform.

  XLA's CPU backend drops optimization barriers before it fuses, which makes those of
  `layers.apply_blocks` useless and lets it undo `jax.checkpoint`; here it must keep them.
  """
  if mesh.devices.flat[0].platform == 'cpu':
    return {'xla_disable_hlo_passes': 'cse_barrier_expander'}
  return {}


def check_batch_size(batch_size: int, mesh: Mesh, accumulate_steps: int = 1, key='batch_size'):
  """UserError unless the batch splits evenly over devices and accumulation steps."""
  parts = mesh.size * accumulate_steps
  if batch_size % parts:
    below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
    near = ' or '.join(str(size) for size in dict.fromkeys((below, above)) if size > 0)
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


def local(tree: Any) -> Any:
  """Replicated global arrays as this process's own, for work that it does alone."""
  return jax.tree.map(lambda x: x.addressable_data(0), tree)
