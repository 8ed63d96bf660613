"""Arrays to files and back: the only module that knows Orbax."""

import functools
import logging
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax

from hivit_jax.train.manifest import KeyPath, nest


def save(path: pathlib.Path, leaves: Mapping[KeyPath, jax.Array], record: dict) -> Any:
  """Returns, with the means to wait for the rest, when the values are copied to the host."""
  with _context():
    tree = nest({tuple(map(str, name)): leaf for name, leaf in leaves.items()})
    return _orbax().save_async(path, tree, custom_metadata=record)


def load(path: pathlib.Path, wanted: Mapping[KeyPath, Any]) -> dict[KeyPath, jax.Array]:
  """Loads leaves of a checkpoint that is known to hold them, in the order of `wanted`."""
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = {
    tuple(map(str, name)): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)
    for name, x in wanted.items()
  }
  with _context():
    tree = _orbax().load(path, nest(abstract))
  return {name: functools.reduce(lambda node, key: node[str(key)], name, tree) for name in wanted}


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
