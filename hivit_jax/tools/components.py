"""Feature maps as colours, and how alike their cells are; in numpy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_COLOURS = 3
_TAILS = 1.0  # per cent of the cells at each end whose colours are cut off


class Components(NamedTuple):
  """Principal components of a level of feature maps.

  Attributes:
    mean: (C,) of all cells.
    basis: (C, 3) directions of the largest variance, the largest first; zeros where C < 3. The
      largest entry of each is positive, so that the same features always get the same colours.
    projected: of each map (h, w, 3), its cells in this basis.
    colours: of each map (h, w, 3) in [0, 1]: each component from its smallest to its largest value
      in all maps, but for 1 % of the cells at either end.
  """

  mean: np.ndarray
  basis: np.ndarray
  projected: list[np.ndarray]
  colours: list[np.ndarray]


def principal(maps: Sequence[np.ndarray]) -> Components:
  """Principal components of all cells of maps (h, w, C), which may differ in h and w."""
  cells = np.concatenate([x.reshape(-1, x.shape[-1]) for x in maps]).astype(np.float64)
  mean = cells.mean(axis=0)
  centred = cells - mean
  vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :_COLOURS]  # ascending variances
  largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
  basis = np.zeros((len(mean), _COLOURS))
  basis[:, : vectors.shape[1]] = vectors * np.where(largest < 0, -1, 1)
  values = centred @ basis
  low, high = np.percentile(values, (_TAILS, 100 - _TAILS), axis=0)
  projected = [(x.astype(np.float64) - mean) @ basis for x in maps]
  colours = [np.clip((x - low) / np.maximum(high - low, 1e-12), 0, 1) for x in projected]
  return Components(mean, basis, projected, colours)


def cosine(features: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Cosine similarity of (..., C) to one vector (C,), or to several (..., 1, C) of its form."""
  return (_unit_length(features) * _unit_length(other)).sum(axis=-1)


def _unit_length(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
