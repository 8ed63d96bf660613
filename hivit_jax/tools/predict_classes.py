"""What `predict` does with a classifier: the classes of whole images, with their probabilities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from hivit_jax.tasks.images import normalize


class Prediction(NamedTuple):
  """A class of an image, and how likely the model takes it to be."""

  label: str
  index: int
  probability: float


class Classification:
  """Classes of images: `classify(images)`; compiled once.

  Args:
    model: the classifier.
    names: of the classes.
    batch_size: images that are computed at a time.
    **pixels: `mean` and `std`.
  """

  def __init__(self, model: Any, names: Sequence[str], batch_size: int, **pixels: Any):
    graphdef, self._params = nnx.split(model)
    self._names, self._batch_size = names, batch_size

    @jax.jit
    def probabilities(params, images):
      return jax.nn.softmax(nnx.merge(graphdef, params)(normalize(images, **pixels)))

    self._probabilities = probabilities

  def __call__(self, images: Sequence[np.ndarray], top: int) -> list[list[Prediction]]:
    """The `top` classes of up to `batch_size` images (H, W, channels), the likeliest first."""
    batch = np.zeros((self._batch_size, *images[0].shape), images[0].dtype)  # always of one size
    batch[: len(images)] = images
    rows = np.asarray(self._probabilities(self._params, batch))[: len(images)]
    return [
      [
        Prediction(self._names[i], i, float(row[i]))
        for i in map(int, np.argsort(-row, kind='stable')[:top])
      ]
      for row in rows
    ]
