"""Accuracies of a segmentation, from the confusion matrix of all pixels."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
  """IoU and accuracy of each class, as mmsegmentation has them.

  Args:
    confusion: (classes, classes) numbers of pixels, by what they are and what they were taken for.

  Returns:
    `iou` (classes,), NaN for a class that is neither labelled nor found; `accuracy` (classes,), the
    share of the class's pixels that were found, NaN for a class that is not labelled; `share`
    (classes,) of all labelled pixels.
  """
  both, labelled, found = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
  with np.errstate(invalid='ignore', divide='ignore'):
    return {
      'iou': both / (labelled + found - both),
      'accuracy': both / labelled,
      'share': labelled / labelled.sum(),
    }


def means(confusion: np.ndarray) -> dict[str, float]:
  """`miou`, `macc`, means over the classes that are not NaN, and `aacc`, over pixels; in [0, 1]."""
  own = scores(confusion)
  return {
    'miou': _mean(own['iou']),
    'macc': _mean(own['accuracy']),
    'aacc': float(np.diag(confusion).sum() / max(confusion.sum(), 1)),
  }


def _mean(values: np.ndarray) -> float:
  known = values[~np.isnan(values)]
  return float(known.mean()) if len(known) else float('nan')


def rows(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
  """One dict a class, for JSON: None where a score is NaN."""
  own = scores(confusion)
  return [
    {'class': name, **{key: _plain(values[i]) for key, values in own.items()}}
    for i, name in enumerate(names)
  ]


def _plain(value: float) -> float | None:
  return None if np.isnan(value) else round(float(value), 5)


def table(confusion: np.ndarray, names: Sequence[str]) -> str:
  """The same as text, in percent, the best class first."""
  text = lambda x: '    -' if x is None else f'{100 * x:5.1f}'  # noqa: E731
  width = max(5, *map(len, names))
  found = sorted(rows(confusion, names), key=lambda row: -(row['iou'] or 0))
  lines = [f'{"class":{width}}    IoU    acc  pixels']
  lines += [
    f'{row["class"]:{width}}  {text(row["iou"])}  {text(row["accuracy"])}   {text(row["share"])}'
    for row in found
  ]
  mean = means(confusion)
  lines.append(
    f'mIoU {100 * mean["miou"]:.2f}, mAcc {100 * mean["macc"]:.2f}, aAcc {100 * mean["aacc"]:.2f}'
  )
  return '\n'.join(lines)
