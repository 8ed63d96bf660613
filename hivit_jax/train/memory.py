"""How much memory a run takes, and whether it is there."""

import math
import pathlib
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hivit_jax.errors import UserError

_MEGABYTE = 1e6
_GIGABYTE = 1e9
# Limits of a container, in its own view of the file system: cgroups version 2 and 1.
_CONTAINER_LIMITS = ('memory.max', 'memory/memory.limit_in_bytes')


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


def check_images(
  mesh: Mesh,
  image_size: tuple[int, int],
  channels: int,
  batch_size: int,
  key: str = 'batch_size',
  *,
  prefetched: int = 0,
) -> None:
  """UserError if there is no room for batches of uint8 images, whatever the model is.

  Each device holds one batch. On CPUs those that the loader has prefetched are in the same memory.

  Args:
    mesh: the devices.
    image_size: (height, width) in pixels.
    channels: of the images.
    batch_size: over all devices.
    key: the setting that it comes from.
    prefetched: batches that the host holds meanwhile.
  """
  room = available(mesh.local_devices)
  copies = 1 + prefetched if mesh.devices.flat[0].platform == 'cpu' else 1
  one = copies * math.prod(image_size) * channels
  own = batch_size // mesh.size * one
  if room is None or own <= room:
    return
  height, width = image_size
  fitting = room // one * mesh.size
  smaller = f'--config.{key}={fitting} or ' if fitting else ''
  raise UserError(
    f'config.{key}={batch_size} images of config.image_size={height},{width} take '
    f'{own / _GIGABYTE:.1f} GB on each of {mesh.size} x {_kind(mesh)}, where '
    f'only {room / _GIGABYTE:.1f} GB are available; try {smaller}a smaller --config.image_size'
  )


def check_state(mesh: Mesh, state: Mapping[str, Any]) -> None:
  """UserError if the devices have no room for a training state; nothing is allocated.

  Args:
    mesh: the devices.
    state: `jax.ShapeDtypeStruct`s with shardings, see `step.abstract_state`.
  """
  room = available(mesh.local_devices)
  sizes = {key: _shard_bytes(part) for key, part in state.items()}
  needed = sum(sizes.values())
  if room is None or needed <= room:
    return
  names = {'params': 'parameters', 'opt_state': 'optimizer state', 'ema': 'their average'}
  parts = [f'{names[key]} {sizes[key] / _GIGABYTE:.1f}' for key in names if key in sizes]
  ways = [
    *([f'--config.mesh.fsdp={mesh.size}'] if mesh.shape['fsdp'] < mesh.size else []),
    *(['--config.ema_decay=None'] if 'ema' in state else []),
    'a smaller --config.model.name or --config.image_size',
    'more devices',
  ]
  raise UserError(
    f'the training state takes {needed / _GIGABYTE:.1f} GB ({", ".join(parts)}) on each of '
    f'{mesh.size} x {_kind(mesh)}, where only {room / _GIGABYTE:.1f} GB are available; what helps: '
    f'{", ".join(ways)}'
  )


def available(devices: Sequence[Any]) -> int | None:
  """Bytes that a program can have on each of some devices of this process; None: nobody knows."""
  limits = [(device.memory_stats() or {}).get('bytes_limit') or 0 for device in devices]
  if all(limits):
    return min(limits)
  if devices[0].platform != 'cpu':
    return None
  room = _host_memory()
  return None if room is None else room // len(devices)  # they share it


def _host_memory() -> int | None:
  """Bytes that this process can have on its host, without those of a swap disk."""
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


def _shard_bytes(tree: Any) -> int:
  """Bytes of a tree on a device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _kind(mesh: Mesh) -> str:
  return mesh.devices.flat[0].device_kind
