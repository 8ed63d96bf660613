"""What the log says about memory is what is held."""

import gc
import mmap
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hivit_jax.runtime import host_memory
from hivit_jax.train import sharding


@pytest.fixture
def no_collection() -> Iterator[None]:
  """No array that an earlier test left in a reference cycle goes away in between."""
  gc.collect()
  gc.disable()
  yield
  gc.enable()


def on_device() -> float:
  return host_memory.in_use()['device_memory_mb']


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
  before = host_memory.in_use()['host_memory_mb']
  fresh[:] = 1
  assert host_memory.in_use()['host_memory_mb'] - before == pytest.approx(50, abs=5)


class Accelerator:
  platform = 'gpu'

  def __init__(self, limit: int | None):
    self._limit = limit

  def memory_stats(self) -> dict | None:
    return None if self._limit is None else {'bytes_limit': self._limit}


def test_room_is_that_of_the_smallest_device_or_a_share_of_the_hosts():
  assert host_memory.available([Accelerator(3), Accelerator(2)]) == 2
  assert host_memory.available([Accelerator(None)]) is None
  cpu = jax.local_devices()[:1]
  alone, shared = host_memory.available(cpu), host_memory.available(cpu * 4)
  assert alone > 1e8
  assert shared == pytest.approx(alone / 4, rel=0.3)  # others come and go
