"""Memory of the host and of its devices: what is used, what there is, what malloc keeps."""

import ctypes
import importlib.util
import math
import pathlib
import re
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax

_MEGABYTE = 1e6
# Limits of a container, in its own view of the file system: cgroups version 2 and 1.
_CONTAINER_LIMITS = ('memory.max', 'memory/memory.limit_in_bytes')
# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1  # as glibc documents it


def keep_freed_memory(*, one_arena: bool) -> bool:
  """Makes malloc keep large blocks for the next step instead of giving them back; on CPUs only.

  XLA's CPU backend allocates its temporaries anew at every step. By default glibc gets blocks of
  that size from the kernel and gives them back at once, and then every step pays for the kernel's
  clearing of every page. Does nothing where the C library is another one, or where JAX may find an
  accelerator. Call it before JAX looks for devices: threads that have begun keep arenas of their
  own. Measurements are in docs/internals/performance-ledger.md.

  Args:
    one_arena: all threads allocate from one arena. Others cannot hold blocks above 64 MB, which
      then go back to the kernel after all; but threads wait for each other, which costs small
      models more than it saves.

  Returns:
    Whether it took effect.
  """
  if not sys.platform.startswith('linux') or _accelerator_expected():
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'gnu_get_libc_version'):
    return False
  settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)) + ((_ARENA_MAX, 1),) * one_arena
  return all(libc.mallopt(parameter, value) for parameter, value in settings)


def _accelerator_expected() -> bool:
  platforms = jax.config.values['jax_platforms']
  if platforms:
    return platforms != 'cpu'
  return any(importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu'))


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


def available(devices: Sequence[Any]) -> int | None:
  """Bytes that a program can have on each of this process's devices; None: unknown."""
  limits = [(device.memory_stats() or {}).get('bytes_limit') or 0 for device in devices]
  if all(limits):
    return min(limits)
  if devices[0].platform != 'cpu':
    return None
  room = _host_memory()
  return None if room is None else room // len(devices)  # they share it


def _host_memory() -> int | None:
  """Bytes of host memory that this process can have, without swap."""
  try:
    text = pathlib.Path('/proc/meminfo').read_text()
  except OSError:
    return None
  free = re.search(r'MemAvailable: *(\d+) kB', text)
  limits = [int(free[1]) * 1024 + _resident()] if free else []
  for name in _CONTAINER_LIMITS:
    file = pathlib.Path('/sys/fs/cgroup', name)
    if file.exists() and (text := file.read_text().strip()).isdecimal():
      limits.append(int(text))
  return min(limits, default=None)
