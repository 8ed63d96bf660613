"""RankMe (arXiv 2210.02885): how many dimensions features use. It needs no labels."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hivit_jax.tasks.evaluators import Collected, Context, Evaluator, Metrics

_EPSILON = 1e-7  # as published


def effective_rank(features: np.ndarray) -> float:
  """The exponential of the entropy of the normalised singular values.

  Args:
    features: (N, D), not centred.

  Returns:
    From 1, if all rows are multiples of one, to min(N, D), if all singular values are equal.
  """
  values = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
  shares = values / max(values.sum(), np.finfo(np.float64).tiny) + _EPSILON
  return float(np.exp(-(shares * np.log(shares)).sum()))


def evaluators(
  context: Context, features: Callable[[Any, jax.Array], jax.Array]
) -> list[Evaluator]:
  """`NAME/rankme` of each evaluation set.

  Args:
    context: what to measure with.
    features: `(model, images) -> (B, D)`.
  """
  every = context.every('rankme')
  if every is None:
    return []

  def finish(found: np.ndarray, index: np.ndarray) -> Metrics:
    del index
    return {'rankme': effective_rank(found)}

  return [
    Evaluator(
      every,
      Collected(
        context,
        context.some(source, context.setting('rankme.size')),
        lambda model, batch: features(model, batch['image']),
        finish,
        name=name,
      ),
    )
    for name, source in context.sets.items()
  ]
