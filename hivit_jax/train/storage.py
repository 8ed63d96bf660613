"""Arrays to files and back: the only module that knows Orbax."""

import functools
import logging
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hivit_jax.train import sharding
from hivit_jax.train.manifest import KeyPath, nest


def save(
  path: pathlib.Path, leaves: Mapping[KeyPath, Any], record: dict, shared: bool = True
) -> Any:
  """Returns, with the means to wait for the rest, when the values are copied to the host.

  Args:
    path: a directory that does not exist.
    leaves: of the state, arrays of JAX's.
    record: custom metadata.
    shared: all processes see the directory, and each writes its part; else process 0 writes all.
  """
  if not shared and jax.process_count() > 1:
    leaves = {name: _at_primary(leaf) for name, leaf in leaves.items()}  # numpy: Orbax has 0 write
  with _context():
    tree = nest({tuple(map(str, name)): leaf for name, leaf in leaves.items()})
    return _orbax().save_async(path, tree, custom_metadata=record)


def load(
  path: pathlib.Path, wanted: Mapping[KeyPath, Any], shared: bool = True
) -> dict[KeyPath, jax.Array]:
  """Loads leaves of a checkpoint that is known to hold them, in the order of `wanted`.

  Args:
    path: of the checkpoint.
    wanted: shapes, dtypes and shardings.
    shared: all processes see the directory; else only process 0 does, and tells the others.
  """
  if not shared and jax.process_count() > 1:
    return _load_at_primary(path, wanted)
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = {
    tuple(map(str, name)): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)
    for name, x in wanted.items()
  }
  with _context():
    tree = _orbax().load(path, nest(abstract))
  return {name: functools.reduce(lambda node, key: node[str(key)], name, tree) for name in wanted}


def _at_primary(leaf: jax.Array) -> np.ndarray:
  value = sharding.fetch(leaf)
  return value if jax.process_index() == 0 else np.broadcast_to(value.dtype.type(0), value.shape)


def _load_at_primary(path: pathlib.Path, wanted: Mapping[KeyPath, Any]) -> dict[KeyPath, jax.Array]:
  tree: dict = {}
  if jax.process_index() == 0:
    context = _context()
    context.multiprocessing.active_processes = {0}
    context.multiprocessing.barrier_sync_key_prefix = 'process_0'
    abstract = {tuple(map(str, name)): np.empty(x.shape, x.dtype) for name, x in wanted.items()}
    with context:
      tree = _orbax().load(path, nest(abstract))
  values = {}
  for name, x in wanted.items():
    value = np.empty(x.shape, x.dtype)
    if jax.process_index() == 0:
      value = np.asarray(functools.reduce(lambda node, key: node[str(key)], name, tree))
    # As bytes: JAX adds up what processes send, and -0.0 + 0.0 is 0.0.
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(value.tobytes(), np.uint8))
    value = np.frombuffer(np.asarray(sent).tobytes(), x.dtype).reshape(x.shape)
    values[name] = sharding.put(value, x.sharding)
  return values


def fault_of_the_disk(error: Exception) -> str | None:
  """What the operating system said, if that is why `save` failed, in one line."""
  reason = str(error).split('\n')[0]
  if isinstance(error, OSError) or 'os_error_code=' in reason:  # the latter is tensorstore's
    return re.sub(r' .[a-z_ ]+=.*', '', reason)  # [os_error_code=..., source locations=...]
  return None


@functools.cache
def _orbax() -> Any:
  """Orbax, imported when it is first needed: it is too slow for `--help`."""
  from orbax.checkpoint import v1

  # The error that a failed save raises is also logged with a trace, once for each of its threads.
  logging.getLogger('absl').addFilter(
    lambda record: '_SignalingThread.run() raised an exception' not in str(record.msg)
  )
  # Where a write fails, others that end later find its event loop closed. TensorStore reports that
  # by the hook for errors that end the program; here nothing of ours is in the trace.
  report = sys.excepthook

  def excepthook(kind, error, trace):
    if not (trace and trace.tb_frame.f_code.co_name == 'call_soon_threadsafe'):
      report(kind, error, trace)

  sys.excepthook = excepthook
  return v1


def _context() -> Any:
  context = _orbax().Context()
  # Float weights shrink by some 10 % at most, for twice the CPU time of saving and of restoring.
  context.array.saving.use_compression = False
  context.pytree.loading.partial_load = True  # what is asked for was compared with the record
  return context
