"""Weighted k-nearest-neighbour classification of features.

As in "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv 1805.01978)
and DINO (arXiv 2104.14294): cosine similarity, each of the k neighbours votes for its class with
weight exp(similarity / temperature). k = 20 and temperature 0.07 are DINO's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 1024  # queries at a time: bounds the (queries, bank) similarity matrix


def knn_predict(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  *,
  num_classes: int,
  k: int = 20,
  temperature: float = 0.07,
) -> np.ndarray:
  """Classifies queries by their neighbours in the bank.

  Args:
    bank: (M, D) features with known labels.
    bank_labels: (M,) integers in [0, num_classes).
    queries: (Q, D) features.
    num_classes: number of classes.
    k: neighbours that vote, at most M of them.
    temperature: of the votes; small: the nearest decide.

  Returns:
    (Q,) predicted labels.
  """
  predict = functools.partial(
    _predict,
    _unit_length(jnp.asarray(bank, jnp.float32)),
    jnp.asarray(bank_labels, jnp.int32),
    num_classes=num_classes,
    k=min(k, len(bank)),
    temperature=temperature,
  )
  padded = np.pad(queries, ((0, -len(queries) % min(_CHUNK, max(len(queries), 1))), (0, 0)))
  chunks = [
    np.asarray(predict(_unit_length(jnp.asarray(padded[i : i + _CHUNK], jnp.float32))))
    for i in range(0, len(padded), _CHUNK)
  ]
  return np.concatenate(chunks or [np.zeros(0, np.int32)])[: len(queries)]


def _unit_length(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=('num_classes', 'k', 'temperature'))
def _predict(bank, labels, queries, *, num_classes, k, temperature):
  # float32 products: a TPU's default would round the similarities to bfloat16.
  similarity = jnp.matmul(queries, bank.T, precision='highest')  # (Q, M)
  top, indices = jax.lax.top_k(similarity, k)
  # Relative to the nearest, so that no temperature overflows.
  # Not top[:, :1]: of a slice XLA's CPU backend makes a sort of the whole bank.
  weights = jnp.exp((top - top.max(axis=1, keepdims=True)) / temperature)
  votes = jax.nn.one_hot(labels[indices], num_classes) * weights[..., None]  # (Q, k, classes)
  return votes.sum(axis=1).argmax(axis=-1)
