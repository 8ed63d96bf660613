"""A data set with the labels of another one."""

from collections.abc import Sequence
from typing import Any


class Relabelled:
  """A source with other labels.

  Args:
    source: the examples.
    labels: new label of each of its classes; examples without a label (-1) stay without.
    class_names: names of the new labels.
  """

  def __init__(self, source: Any, labels: Sequence[int], class_names: Sequence[str]):
    self._source = source
    self._labels = tuple(labels)
    self.name, self.split = source.name, source.split
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict:
    example = self._source[index]
    label = example.get('label', -1)
    return {**example, 'label': self._labels[label] if label >= 0 else label}

  def example_name(self, index: int) -> str:
    return self._source.example_name(index)
