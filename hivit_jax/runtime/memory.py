"""Whether the devices have room for the images and the training state of a run."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hivit_jax.errors import UserError
from hivit_jax.runtime import host_memory

_GIGABYTE = 1e9


def check_images(
  mesh: Mesh,
  image_size: tuple[int, int],
  channels: int,
  batch_size: int,
  key: str = 'batch_size',
  *,
  prefetched: int = 0,
  dtype: str = 'uint8',
) -> None:
  """UserError if there is no room for batches of images, whatever the model is.

  Each device holds one batch. On CPUs those that the loader has prefetched are in the same memory.

  Args:
    mesh: the devices.
    image_size: (height, width) in pixels.
    channels: of the images.
    batch_size: over all devices.
    key: the setting that it comes from.
    prefetched: batches that the host holds meanwhile.
    dtype: of their pixels.
  """
  room = host_memory.available(mesh.local_devices)
  copies = 1 + prefetched if mesh.devices.flat[0].platform == 'cpu' else 1
  one = copies * math.prod(image_size) * channels * np.dtype(dtype).itemsize
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
    state: `jax.ShapeDtypeStruct`s with shardings, see `train.step.abstract_state`.
  """
  room = host_memory.available(mesh.local_devices)
  sizes = {key: _shard_bytes(part) for key, part in state.items()}
  needed = sum(sizes.values())
  if room is None or needed <= room:
    return
  names = {'params': 'parameters', 'opt_state': 'optimizer state', 'ema': 'their average'}
  parts = [f'{names[key]} {sizes[key] / _GIGABYTE:.1f}' for key in names if key in sizes]
  ways = [
    *([f'--config.mesh.fsdp={mesh.size}'] if mesh.shape['fsdp'] < mesh.size else []),
    *(['--config.ema_decay=None'] if 'ema' in state else []),
    'a smaller model (--config.model.name) or --config.image_size',
    'more devices',
  ]
  raise UserError(
    f'the training state takes {needed / _GIGABYTE:.1f} GB ({", ".join(parts)}) on each of '
    f'{mesh.size} x {_kind(mesh)}, where only {room / _GIGABYTE:.1f} GB are available; what helps: '
    f'{", ".join(ways)}'
  )


def _shard_bytes(tree: Any) -> int:
  """Bytes of a tree on a device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _kind(mesh: Mesh) -> str:
  return mesh.devices.flat[0].device_kind
