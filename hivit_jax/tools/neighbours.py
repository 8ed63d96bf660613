"""The images that are nearest to others in a model's features."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from hivit_jax.models import inside
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.simmim import SimMIM
from hivit_jax.tasks.images import normalize
from hivit_jax.tasks.mae import pooled_stages
from hivit_jax.tools import components

_BATCH = 16  # images at a time


def nearest(
  queries: Sequence[np.ndarray],
  bank: Iterable[tuple[str, np.ndarray]],
  model: nnx.Module,
  statistics: dict[str, Any],
  count: int,
) -> list[list[tuple[str, float]]]:
  """For each query the paths of its `count` neighbours in a bank, the nearest first.

  What is compared is the mean over the last stage, or over all stages of an autoencoder, as in the
  k-NN evaluation of its training.

  Args:
    queries: (H, W, channels) uint8, of the encoder's image size.
    bank: path and pixels of images; few are in memory at a time.
    model: see `inside.encoder_of`.
    statistics: `mean` and `std` of its pixels.
    count: of neighbours; fewer where the bank has fewer.

  Returns:
    Path and cosine of each neighbour; nothing where the bank is empty.
  """
  graphdef, params = nnx.split(model)

  @jax.jit
  def describe(params, pixels):
    model = nnx.merge(graphdef, params)
    encoder, images = inside.encoder_of(model), normalize(pixels, **statistics)
    if isinstance(model, MaskedAutoencoder | SimMIM):
      return pooled_stages(encoder.stages(images))
    return encoder.pooled(images)

  def described(images: Iterable[tuple[str, np.ndarray]]) -> tuple[list[str], np.ndarray]:
    paths, found, images = [], [], iter(images)
    while part := list(itertools.islice(images, _BATCH)):
      batch = np.zeros((_BATCH, *part[0][1].shape), np.uint8)  # of one size: compiled once
      batch[: len(part)] = [pixels for _, pixels in part]
      paths += [path for path, _ in part]
      found.append(np.asarray(describe(params, batch), np.float32)[: len(part)])
    return paths, np.concatenate(found) if found else np.empty((0, 0))

  paths, features = described(bank)
  if not paths:
    return []
  result = []
  for query in described(('', pixels) for pixels in queries)[1]:
    alike = components.cosine(features, query)
    best = np.argsort(-alike, kind='stable')[:count]
    result.append([(paths[i], float(alike[i])) for i in best])
  return result
