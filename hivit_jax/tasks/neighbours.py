"""Weighted k-nearest-neighbour classification of features.

As in "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv 1805.01978)
and DINO (arXiv 2104.14294): cosine similarity, each of the k neighbours votes for its class with
weight exp(similarity / temperature). k = 20 and temperature 0.07 are DINO's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 1024  # queries at a time
_PART = 4096  # of the bank at a time: the two bound the matrix of similarities


class Neighbours:
  """The nearest neighbours of queries in a bank that comes in parts and is not kept.

  The result is that of the whole bank at once. Of neighbours at the same distance the earlier ones
  count. On the device are the queries, their neighbours so far, and `_PART` rows of the bank.
  """

  def __init__(self, queries: np.ndarray, *, k: int, bank_size: int):
    """Begins with an empty bank.

    Args:
      queries: (Q, D) features.
      k: neighbours of each.
      bank_size: rows that `add` will get at most.
    """
    self._count = len(queries)
    rows = min(_CHUNK, max(1, self._count))
    chunks = max(1, -(-self._count // rows))
    padded = np.zeros((chunks * rows, queries.shape[1]), np.float32)
    padded[: self._count] = queries
    self._queries = _unit_length(jnp.asarray(padded.reshape(chunks, rows, -1)))
    shape = (chunks, rows, min(k, bank_size))
    self._similarities = jnp.full(shape, -jnp.inf)
    self._labels = jnp.zeros(shape, jnp.int32)
    self._new_part(min(_PART, bank_size), queries.shape[1])

  def _new_part(self, rows: int, width: int) -> None:
    self._part = np.zeros((rows, width), np.float32)
    self._part_labels = np.zeros(rows, np.int32)
    self._filled = 0

  def add(self, features: np.ndarray, labels: np.ndarray) -> None:
    """Adds rows to the bank: (B, D) features and (B,) integer labels."""
    start = 0
    while start < len(features):
      take = min(len(features) - start, len(self._part) - self._filled)
      place = slice(self._filled, self._filled + take)
      self._part[place] = features[start : start + take]
      self._part_labels[place] = labels[start : start + take]
      self._filled += take
      start += take
      if self._filled == len(self._part):
        self._merge()

  def predict(self, *, num_classes: int, temperature: float) -> np.ndarray:
    """Lets the neighbours in the bank so far vote.

    Args:
      num_classes: number of classes; all labels are below it.
      temperature: of the votes; small: the nearest decide.

    Returns:
      (Q,) int32 predicted labels; -1 for queries without neighbours, such as NaN.
    """
    if self._filled:
      self._merge()
    predicted = _vote(self._similarities, self._labels, num_classes, temperature)
    return np.asarray(predicted, np.int32).reshape(-1)[: self._count]

  def _merge(self) -> None:
    self._similarities, self._labels = _nearest(
      self._similarities, self._labels, self._queries, self._part, self._part_labels, self._filled
    )
    self._new_part(*self._part.shape)  # JAX may not have read the old one yet


def _unit_length(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@jax.jit
def _nearest(similarities, labels, queries, part, part_labels, filled):
  """Merges the first `filled` rows of a part into the neighbours: (chunks, rows, k) twice."""
  part = _unit_length(part)
  k = similarities.shape[-1]

  def merge(chunk):
    before, labels, queries = chunk
    # float32 products: a TPU's default would round the similarities to bfloat16.
    new = jnp.matmul(queries, part.T, precision='highest')  # (rows, M)
    new = jnp.where(jnp.arange(len(part)) < filled, new, -jnp.inf)
    # Among equals `top_k` prefers the first, so earlier parts win.
    top, index = jax.lax.top_k(jnp.concatenate([before, new], axis=1), k)
    old = jnp.take_along_axis(labels, jnp.minimum(index, k - 1), axis=1)
    return top, jnp.where(index < k, old, part_labels[jnp.maximum(index - k, 0)])

  return jax.lax.map(merge, (similarities, labels, queries))


@functools.partial(jax.jit, static_argnames=('num_classes', 'temperature'))
def _vote(similarities, labels, num_classes, temperature):
  """(chunks, rows, k) twice -> (chunks, rows)."""

  def vote(chunk):
    top, labels = chunk
    # Relative to the nearest, so that no temperature overflows. Missing neighbours, where the bank
    # has less than k, are infinitely far away and weigh nothing.
    weights = jnp.exp((top - top.max(axis=1, keepdims=True)) / temperature)
    votes = jax.nn.one_hot(labels, num_classes) * weights[..., None]  # (rows, k, classes)
    found = jnp.isfinite(top.max(axis=1))  # not so for NaN features or an empty bank
    return jnp.where(found, votes.sum(axis=1).argmax(axis=-1), -1)

  return jax.lax.map(vote, (similarities, labels))
