"""Autoencoders with masks of any count of units in one program, for masks that people paint.

Training gathers the kept units, so that the others cost nothing; their number is then part of the
program. Here all units are computed, nothing attends to the removed ones, and the decoder gets the
mask token in their places: the same predictions, for more work.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models import layers
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.simmim import SimMIM


def predict(model: MaskedAutoencoder | SimMIM, images: jax.Array, mask: jax.Array) -> jax.Array:
  """Predicts the removed units; the mask may be traced.

  Args:
    model: the autoencoder; it stays as it is.
    images: (B, H, W, channels) of its image size, normalised.
    mask: (B, N), 1 or True = removed; it keeps at least one unit of each image.

  Returns:
    (B, N, numbers) float32, as `pred` of `MAEOutput`; it means nothing where units are kept.
  """
  if isinstance(model, SimMIM):
    return model.reconstruct(images, model.patches(mask))[0]
  removed = mask.astype(bool)
  everywhere = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
  hidden = jnp.where(removed, layers.NEVER, 0.0)
  hidden = jnp.pad(hidden, ((0, 0), (model.class_tokens, 0)))[:, None, None]  # of the keys
  own = model.ops.attend

  def attend(qkv: jax.Array, heads: int, bias: jax.Array | None = None) -> jax.Array:
    return own(qkv, heads, hidden if bias is None else bias + hidden)

  encoder = nnx.merge(*nnx.split(model))
  encoder.set_attributes(ops=dataclasses.replace(model.ops, attend=attend))
  # With ids, as in training: the position embedding of iTPN depends on it.
  return model.decode(encoder.latent(images, everywhere), everywhere, removed)
