"""What does not fit the devices is refused before anything is allocated."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from hivit_jax.errors import UserError
from hivit_jax.runtime import host_memory, memory
from hivit_jax.train import sharding


def small_device(monkeypatch, room: int) -> None:
  monkeypatch.setattr(host_memory, 'available', lambda devices: room)


def abstract_state(mesh, *names: str) -> dict:
  """A kernel of 4 MB for each name."""
  state = {name: {'kernel': jax.ShapeDtypeStruct((1024, 1024), jnp.float32)} for name in names}
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  return jax.tree.map(place, state, sharding.state_shardings(state, mesh))


def test_a_state_that_does_not_fit_is_refused_with_its_parts_and_the_ways_out(monkeypatch):
  mesh = sharding.make_mesh(fsdp=1)
  state = abstract_state(mesh, 'params', 'opt_state', 'ema')
  small_device(monkeypatch, 3 * 2**22)
  memory.check_state(mesh, state)
  small_device(monkeypatch, 3 * 2**22 - 1)
  monkeypatch.setattr(memory, '_GIGABYTE', 2**20)
  with pytest.raises(UserError) as error:
    memory.check_state(mesh, state)
  assert str(error.value).startswith(
    'the training state takes 12.0 GB (parameters 4.0, optimizer state 4.0, their average 4.0) on '
    f'each of {mesh.size} x cpu, where only 12.0 GB are available; what helps: '
  )
  assert '--config.ema_decay=None, a smaller model (--config.model.name)' in str(error.value)


def test_what_is_split_over_devices_counts_by_its_share(monkeypatch):
  mesh = AbstractMesh((2, 4), sharding.AXES)
  state = {'params': {'kernel': jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}}
  state['params']['kernel'] = jax.ShapeDtypeStruct(
    (1024, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec('fsdp'))
  )
  assert memory._shard_bytes(state) == 2**20


def test_images_that_do_not_fit_are_refused_with_the_batch_that_does(monkeypatch):
  mesh = sharding.make_mesh()
  batch = 8 * mesh.size
  small_device(monkeypatch, 3 * 8 * 32 * 64 * 3)
  memory.check_images(mesh, (32, 64), 3, batch, prefetched=2)  # in the same memory
  small_device(monkeypatch, 3 * 8 * 32 * 64 * 3 - 1)
  memory.check_images(mesh, (32, 64), 3, batch)
  with pytest.raises(UserError, match=f'try --config.batch_size={7 * mesh.size} or a smaller'):
    memory.check_images(mesh, (32, 64), 3, batch, prefetched=2)
  small_device(monkeypatch, 8 * 32 * 64 * 3 - 1)
  with pytest.raises(UserError, match=f'try --config.batch_size={7 * mesh.size} or a smaller'):
    memory.check_images(mesh, (32, 64), 3, batch)
  small_device(monkeypatch, 32 * 64)
  with pytest.raises(UserError, match=r'try a smaller --config.image_size$'):
    memory.check_images(mesh, (32, 64), 3, batch, 'evaluation.batch_size')
