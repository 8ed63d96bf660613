"""Masked autoencoding as a task for the training loop."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.simmim import SimMIM
from hivit_jax.tasks.images import normalize

Batch = Mapping[str, jax.Array]
Model = MaskedAutoencoder | SimMIM


@dataclasses.dataclass(frozen=True)
class MAETask:
  """Reconstruct the removed units of an image.

  Attributes:
    mean, std: per channel, of pixels in [0, 1].
  """

  mean: Sequence[float]
  std: Sequence[float]

  def prepare(self, model: Model, batch: Batch, rng: jax.Array) -> Batch:
    """Adds the random numbers of a whole batch, which parts of it then share out.

    Args:
      model: the model to be trained.
      batch: `image` (B, H, W, C) uint8.
      rng: PRNG key of this step.

    Returns:
      `image`, `noise` (B, N) and, with drop path, `drop_path_noise` (B, blocks, 2).
    """
    images = batch['image']
    masking, drop_path = jax.random.split(rng)
    prepared = {'image': images, 'noise': model.masking_noise(masking, len(images))}
    if any(model.drop_path_rates):
      prepared['drop_path_noise'] = model.drop_path_noise(drop_path, len(images))
    return prepared

  def loss(self, model: Model, batch: Batch) -> tuple[jax.Array, dict]:
    """Loss and metrics of a batch, or a part of one, from `prepare`; means over its examples."""
    out = model(
      normalize(batch['image'], self.mean, self.std),
      noise=batch['noise'],
      drop_path_noise=batch.get('drop_path_noise'),
    )
    return out.loss, {}

  def features(self, model: Model, images: jax.Array) -> jax.Array:
    """Pooled features of whole images, for k-NN classification.

    All three stages, as the decoder gets them ("hierarchical features"): every token is
    normalised, tokens are averaged, stages are concatenated. The last stage alone serves the
    reconstruction more than it describes the image: on `photo_tiles` its accuracy falls while the
    autoencoder improves, that of all stages rises.

    Args:
      model: the autoencoder.
      images: (B, H, W, C) uint8.

    Returns:
      (B, C/4 + C/2 + C) float32.
    """
    stages = model.stages(normalize(images, self.mean, self.std))
    pooled = []
    for tokens in stages:  # (B, ..., c); of HiViT (B, N, cells, c) twice, then (B, N, C)
      tokens = tokens.astype(jnp.float32)
      tokens = (tokens - tokens.mean(-1, keepdims=True)) / (tokens.std(-1, keepdims=True) + 1e-6)
      pooled.append(tokens.mean(axis=tuple(range(1, tokens.ndim - 1))))
    return jnp.concatenate(pooled, axis=-1)
