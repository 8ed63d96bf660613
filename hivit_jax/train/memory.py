"""How much memory a run takes, for the log."""

import math
import resource
import sys
from typing import Any

import jax

_MEGABYTE = 1e6


def in_use() -> dict[str, float]:
  """Memory of this process and of its first device, in MB (10^6 bytes).

  Returns:
    `host_memory_mb`: resident set of this process, without data workers; where /proc does not
    tell, the largest that it has been. `device_memory_mb`: what the device's allocator counts; on
    CPUs, which do not count, the arrays that the program holds, without temporaries of a step.
  """
  return {
    'host_memory_mb': _resident() / _MEGABYTE,
    'device_memory_mb': _on_device(jax.local_devices()[0]) / _MEGABYTE,
  }


def _resident() -> int:
  try:
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * resource.getpagesize()
  except FileNotFoundError:
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _on_device(device: Any) -> int:
  stats = device.memory_stats()
  if stats:
    return stats['bytes_in_use']
  return sum(
    math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    for array in jax.live_arrays()
    if device in array.sharding.device_set
  )
