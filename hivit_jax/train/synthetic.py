"""Batches without data, for plans and measurements of training steps."""

import math
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from hivit_jax.train import assemble, sharding


def canvas(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """(height, width) of the images of a step: `image_size`, or the largest of a task's buckets."""
  buckets = getattr(assemble.task(config), 'buckets', ())
  return max(buckets, key=math.prod, default=assemble.image_size(config))


def abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """Shapes, types and places of what a training step of the config takes, on its `canvas`."""
  place, count = sharding.batch_sharding(mesh), config.batch_size
  return {
    key: jax.ShapeDtypeStruct((count, *one.shape), one.dtype, sharding=place)
    for key, one in assemble.task(config).shapes(canvas(config), config.channels).items()
  }


def batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, jax.Array]:
  """Such a batch on the devices: images of random pixels that fill the canvas, zeros elsewhere."""
  arrays, count = {}, config.batch_size // jax.process_count()
  for key, leaf in abstract_batch(config, mesh).items():
    shape = (count, *leaf.shape[1:])
    arrays[key] = np.zeros(shape, leaf.dtype)
    if key == 'image':
      arrays[key] = np.random.default_rng(0).integers(0, 256, shape, leaf.dtype)
    elif key in ('size', 'extent'):
      arrays[key] += np.array(canvas(config), leaf.dtype)
  return sharding.put_batch(arrays, mesh)
