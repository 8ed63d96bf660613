"""What the log says about memory is what is held."""

import gc
import mmap
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from hivit_jax.errors import UserError
from hivit_jax.train import memory, sharding


@pytest.fixture
def no_collection() -> Iterator[None]:
  """No array that an earlier test left in a reference cycle goes away in between."""
  gc.collect()
  gc.disable()
  yield
  gc.enable()


def on_device() -> float:
  return memory.in_use()['device_memory_mb']


def test_device_memory_counts_the_arrays_that_are_held(no_collection: None):
  before = on_device()
  held = jnp.zeros((1000, 1000), jnp.float32)
  assert on_device() - before == pytest.approx(4.0)
  donated = jax.jit(lambda x: x + 1, donate_argnums=0)(held)
  assert on_device() - before == pytest.approx(4.0)
  del donated
  assert on_device() - before == pytest.approx(0)


def test_of_what_is_split_over_devices_the_first_ones_share_counts(no_collection: None):
  mesh = sharding.make_mesh()
  before = on_device()
  split = jax.device_put(
    np.zeros((1000, 8, 125), np.float32), NamedSharding(mesh, PartitionSpec(None, ('data', 'fsdp')))
  )
  assert on_device() - before == pytest.approx(4.0 / mesh.size)
  del split


def test_host_memory_grows_by_what_is_written_to():
  fresh = np.frombuffer(mmap.mmap(-1, 50_000_000), np.uint8)  # no memory that malloc has kept
  before = memory.in_use()['host_memory_mb']
  fresh[:] = 1
  assert memory.in_use()['host_memory_mb'] - before == pytest.approx(50, abs=5)


def small_device(monkeypatch, room: int) -> None:
  monkeypatch.setattr(memory, 'available', lambda devices: room)


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
  assert '--config.ema_decay=None, a smaller --config.model.name' in str(error.value)


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


class Accelerator:
  platform = 'gpu'

  def __init__(self, limit: int | None):
    self._limit = limit

  def memory_stats(self) -> dict | None:
    return None if self._limit is None else {'bytes_limit': self._limit}


def test_room_is_that_of_the_smallest_device_or_a_share_of_the_hosts():
  assert memory.available([Accelerator(3), Accelerator(2)]) == 2
  assert memory.available([Accelerator(None)]) is None
  cpu = jax.local_devices()[:1]
  alone, shared = memory.available(cpu), memory.available(cpu * 4)
  assert alone > 1e8
  assert shared == pytest.approx(alone / 4, rel=0.3)  # others come and go
