"""Part of a data set."""

from typing import Any

import numpy as np


class Subset:
  """Evenly spread examples of a source.

  Args:
    source: the whole.
    size: at most so many examples; 0 for all.
  """

  def __init__(self, source: Any, size: int):
    size = min(size, len(source)) if size else len(source)
    self._source = source
    self._indices = np.linspace(0, len(source) - 1, size).round().astype(int)
    self.name, self.split = source.name, source.split
    self.class_names = source.class_names
    self.num_classes = source.num_classes
    self.palette = getattr(source, 'palette', None)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict:
    return self._source[int(self._indices[index])]

  def example_name(self, index: int) -> str:
    return self._source.example_name(int(self._indices[index]))
