"""Part of a data set."""

from typing import Any

import numpy as np


class Subset:
  """Some examples of a source.

  Attributes:
    indices: (n,) of these examples in the whole source.
  """

  def __init__(self, source: Any, indices: np.ndarray):
    self._source, self.indices = source, indices
    self.name, self.split = source.name, source.split
    self.class_names = source.class_names
    self.num_classes = source.num_classes
    self.palette = getattr(source, 'palette', None)
    self.category_ids = getattr(source, 'category_ids', None)
    scenes = getattr(source, 'scenes', None)
    self.scenes = None if scenes is None else scenes[indices]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> dict:
    return self._source[int(self.indices[index])]

  def example_name(self, index: int) -> str:
    return self._source.example_name(int(self.indices[index]))


def spread(source: Any, size: int) -> Subset:
  """Evenly spread examples of a source, at most so many; 0: all."""
  size = min(size, len(source)) if size else len(source)
  return Subset(source, np.linspace(0, len(source) - 1, size).round().astype(int))
