"""Masked autoencoding as a task for the training loop."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.simmim import SimMIM
from hivit_jax.tasks import knn, rankme, reconstruction
from hivit_jax.tasks.evaluators import Context, Evaluator
from hivit_jax.tasks.images import normalize
from hivit_jax.tasks.task import Batch, ImageTask

Model = MaskedAutoencoder | SimMIM


@dataclasses.dataclass(frozen=True)
class MAETask(ImageTask):
  """Reconstruct the removed units of an image."""

  model_class = MaskedAutoencoder
  model_kind = 'masked autoencoder'
  # As the official pretraining: everything with more than one dimension decays, the learned
  # position embedding and the mask token included.
  rules = (
    ('(decoder_)?pos_embed', 'frozen'),
    (r'(.*/)?(bias|scale|gamma_[12])|hogs/simple_weights', 'no_decay'),
    (r'(.*/)?kernel', 'decay'),
    (r'absolute_pos_embed|cls_token|mask_token|.*/relative_position_bias_table', 'decay'),
  )
  measures = frozenset(('knn', 'rankme', 'pictures'))
  example = 'reconstruct {workdir} --images=PICTURE.jpg --mask_ratio=0.6'

  def prepare(self, model: Model, batch: Batch, rng: jax.Array) -> Batch:
    """Adds the random numbers of a whole batch, before it is split into parts.

    Args:
      model: the model to be trained.
      batch: `image` (B, H, W, C) uint8.
      rng: PRNG key of this step.

    Returns:
      `image`, `noise` (B, N), `count` () of examples and, with drop path, `drop_path_noise`
      (B, blocks, 2).
    """
    images = batch['image']
    masking, drop_path = jax.random.split(rng)
    prepared = {
      'image': images,
      'noise': model.masking_noise(masking, len(images)),
      'count': jnp.float32(len(images)),
    }
    if any(model.drop_path_rates):
      prepared['drop_path_noise'] = model.drop_path_noise(drop_path, len(images))
    return prepared

  def loss(self, model: Model, batch: Batch) -> tuple[jax.Array, dict]:
    """The mean over the batch: as many pixels are removed from every image."""
    out = model(
      normalize(batch['image'], self.mean, self.std),
      noise=batch['noise'],
      drop_path_noise=batch.get('drop_path_noise'),
    )
    return out.loss * (len(batch['image']) / batch['count']), {}

  def evaluators(self, context: Context) -> list[Evaluator]:
    """k-NN accuracy or segmentation by features, their rank, pictures of reconstructions."""
    return [
      *knn.evaluators(context, self.features, self.unit_features),
      *rankme.evaluators(context, self.features),
      *reconstruction.evaluators(context, mean=self.mean, std=self.std),
    ]

  def features(self, model: Model, images: jax.Array) -> jax.Array:
    """Features of whole images, for k-NN classification; see `pooled_stages`.

    Args:
      model: the autoencoder.
      images: (B, H, W, C) uint8.

    Returns:
      (B, C/4 + C/2 + C) float32.
    """
    return pooled_stages(model.stages(normalize(images, self.mean, self.std)))

  def unit_features(self, model: Model, images: jax.Array) -> jax.Array:
    """(B, H, W, C) uint8 -> (B, rows, columns, C/4 + C/2 + C) of units, for k-NN segmentation."""
    return pooled_stages(model.unit_tokens(normalize(images, self.mean, self.std)), keep=3)


def pooled_stages(stages: Sequence[jax.Array], keep: int = 1) -> jax.Array:
  """Joins the stages of an encoder.

  All of them, as the decoder gets them ("hierarchical features"): every token is normalised, tokens
  are averaged, stages are concatenated. The last stage alone serves the reconstruction more than it
  describes the image: on `photo_tiles` its accuracy falls while the autoencoder improves, that of
  all stages rises.

  Args:
    stages: (B, ..., c) each; of HiViT (B, N, cells, c) twice, then (B, N, C).
    keep: leading axes over which there is no mean.

  Returns:
    (B, ..., sum of c) float32, with as many axes before the last one.
  """
  pooled = []
  for tokens in stages:
    tokens = tokens.astype(jnp.float32)
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / (tokens.std(-1, keepdims=True) + 1e-6)
    pooled.append(tokens.mean(axis=tuple(range(keep, tokens.ndim - 1))))
  return jnp.concatenate(pooled, axis=-1)
