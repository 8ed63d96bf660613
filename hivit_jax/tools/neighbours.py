"""The images that are nearest to others in a model's features."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Neighbour(NamedTuple):
  """An image near another one.

  Attributes:
    path: of the file.
    pixels: (H, W, channels) uint8, as the model got them.
    similarity: cosine of the two images' features.
  """

  path: str
  pixels: np.ndarray
  similarity: float


def nearest(
  queries: Sequence[np.ndarray],
  bank: Sequence[tuple[str, np.ndarray]],
  model: nnx.Module,
  statistics: dict[str, Any],
  count: int,
) -> list[list[Neighbour]]:
  """For each query its `count` neighbours in a bank, the nearest first.

  What is compared is the mean over the last stage, or over all stages of an autoencoder, as in the
  k-NN evaluation of its training.

  Args:
    queries: (H, W, channels) uint8, of the encoder's image size.
    bank: path and pixels of images, at least one.
    model: see `inside.encoder_of`.
    statistics: `mean` and `std` of its pixels.
    count: of neighbours; fewer where the bank has fewer.
  """
  graphdef, params = nnx.split(model)

  @jax.jit
  def describe(params, pixels):
    model = nnx.merge(graphdef, params)
    encoder, images = inside.encoder_of(model), normalize(pixels, **statistics)
    if isinstance(model, MaskedAutoencoder | SimMIM):
      return pooled_stages(encoder.stages(images))
    return encoder.pooled(images)

  def described(images: Sequence[np.ndarray]) -> np.ndarray:
    found = []
    for start in range(0, len(images), _BATCH):
      part = images[start : start + _BATCH]
      batch = np.zeros((_BATCH, *part[0].shape), np.uint8)  # of one size: compiled once
      batch[: len(part)] = part
      found.append(np.asarray(describe(params, batch), np.float32)[: len(part)])
    return np.concatenate(found)

  features = described([pixels for _, pixels in bank])
  result = []
  for query in described(queries):
    alike = components.cosine(features, query)
    best = np.argsort(-alike, kind='stable')[:count]
    result.append([Neighbour(*bank[i], similarity=float(alike[i])) for i in best])
  return result
