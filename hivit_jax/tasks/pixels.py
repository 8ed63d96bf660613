"""Losses and counts over the pixels of label maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hivit_jax.models import resize

_BLOCKS = (8, 4, 2, 1)  # parts of the rows that are computed one after the other


def cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  ignore_index: int,
  class_weights: Sequence[float] = (),
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy of logits that are resized bilinearly to the size of the labels.

  At full resolution the logits are the largest array of a training step. So they are computed for a
  part of the rows at a time, and again in the backward pass: no more is ever in memory.

  Args:
    logits: (B, h, w, classes).
    labels: (B, H, W) integers.
    ignore_index: label of pixels that do not count.
    class_weights: of the pixels of each class; empty: 1.

  Returns:
    () sum over the labelled pixels; () float32 number of them whose largest logit is right.
  """
  (_, h, w, classes), (b, height, width) = logits.shape, labels.shape
  count = next(blocks for blocks in _BLOCKS if height % blocks == 0)
  x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  rows = jnp.asarray(resize.bilinear_matrix(h, height), x.dtype).reshape(count, -1, h)
  columns = jnp.asarray(resize.bilinear_matrix(w, width), x.dtype)
  x = jnp.einsum('Ww,bhwk->bhWk', columns, x, precision='highest')
  weights = jnp.asarray(class_weights or (1.0,) * classes, x.dtype)
  names = jnp.arange(classes, dtype=jnp.int32)

  @jax.checkpoint
  def add(sums, block):
    matrix, label = block  # (rows, h), (B, rows, W)
    part = jnp.einsum('Hh,bhWk->bHWk', matrix, x, precision='highest')
    # Of ignored pixels, no class at all, even where their label is one by its number.
    target = (label[..., None] == names) & (label != ignore_index)[..., None]
    value = jax.nn.logsumexp(part, axis=-1) - jnp.where(target, part, 0).sum(axis=-1)
    weight = jnp.where(target, weights, 0).sum(axis=-1)
    right = (part.argmax(axis=-1) == label) & (label != ignore_index)
    return (sums[0] + (value * weight).sum(), sums[1] + right.sum(dtype=jnp.int32)), None

  labels = labels.astype(jnp.int32).reshape(b, count, -1, width).swapaxes(0, 1)
  start = jnp.zeros((), x.dtype), jnp.zeros((), jnp.int32)
  (loss, right), _ = jax.lax.scan(add, start, (rows, labels))
  return loss, right.astype(jnp.float32)


def confusion(found: jax.Array, labels: jax.Array, classes: int, *, ignore_index: int) -> jax.Array:
  """(classes, classes) int32 numbers of pixels, by what they are and what they were taken for.

  Args:
    found: integers in [0, classes), of any shape.
    labels: of the same shape; `ignore_index` or a number that is no class: does not count.
    classes: how many.
    ignore_index: label of pixels that do not count.
  """
  labels, found = (x.astype(jnp.int32).reshape(-1) for x in (labels, found))
  known = (labels != ignore_index) & (labels >= 0) & (labels < classes)
  places = jnp.where(known, labels * classes + found, classes * classes)
  return jnp.bincount(places, length=classes * classes + 1)[:-1].reshape(classes, classes)
