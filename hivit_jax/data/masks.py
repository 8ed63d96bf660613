"""Masks of objects on the host: crops for training, and pasting what a model predicts."""

import numpy as np

CROP = 112  # cells along a side of a crop, as in `detection.mask_targets`


def crop(mask: np.ndarray, box: np.ndarray, side: int = CROP) -> np.ndarray:
  """Coverage of a mask within a box.

  Args:
    mask: (height, width) of 0 and 1.
    box: (4,) x1, y1, x2, y2 in pixels.
    side: rows and columns of the result.

  Returns:
    (side, side) uint8: 255 where a cell is covered completely.
  """
  rows, columns = touched(box, mask.shape)
  x1, y1, x2, y2 = (float(value) for value in box)
  down = _means(mask[rows, columns], y1 - rows.start, y2 - rows.start, side)
  across = _means(down.T, x1 - columns.start, x2 - columns.start, side)
  return np.rint(255 * across.T.clip(0, 1)).astype(np.uint8)


def touched(box: np.ndarray, size: tuple[int, ...]) -> tuple[slice, slice]:
  """The rows and columns of an image of a size (height, width) that a box covers any part of."""
  x1, y1, x2, y2 = (float(value) for value in box)
  top, bottom = max(int(np.floor(y1)), 0), min(int(np.ceil(y2)), size[0])
  left, right = max(int(np.floor(x1)), 0), min(int(np.ceil(x2)), size[1])
  return slice(top, bottom), slice(left, right)


def _means(rows: np.ndarray, start: float, stop: float, parts: int) -> np.ndarray:
  """Means over equal parts of [start, stop], from the integral over rows, which are 1 apart.

  (n, columns) -> (parts, columns) float64; outside of the rows there are zeros.
  """
  dtype = np.int32 if rows.dtype == np.uint8 else np.float64
  integral = np.zeros((len(rows) + 1, rows.shape[1]), dtype)
  np.cumsum(rows, axis=0, dtype=dtype, out=integral[1:])
  edges = np.linspace(start, stop, parts + 1).clip(0, len(rows))
  whole = np.minimum(edges.astype(np.int64), len(rows) - 1)
  at_edges = integral[whole] + (edges - whole)[:, None] * rows[whole]
  return np.diff(at_edges, axis=0) / max((stop - start) / parts, 1e-9)


def paste(probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A predicted mask in the image: bilinear between cells' centres, zeros outside.

  Args:
    probabilities: (rows, columns) within the box.
    box: (4,) x1, y1, x2, y2 in pixels of the image.
    size: (height, width) of the image.

  Returns:
    (height, width) float32 probabilities; the mask is where they reach one half.
  """
  x1, y1, x2, y2 = (np.float32(value) for value in box)
  down = _hat(y1, y2, probabilities.shape[0], size[0])
  across = _hat(x1, x2, probabilities.shape[1], size[1])
  return down @ probabilities.astype(np.float32) @ across.T


def _hat(start: np.float32, stop: np.float32, cells: int, pixels: int) -> np.ndarray:
  """(pixels, cells) weights of linear interpolation at the pixels' centres."""
  if not stop > start:
    return np.zeros((pixels, cells), np.float32)
  center = np.arange(pixels, dtype=np.float32) + np.float32(0.5)
  position = (center - start) / (stop - start) * np.float32(cells) - np.float32(0.5)
  distance = np.abs(position[:, None] - np.arange(cells, dtype=np.float32))
  return np.maximum(np.float32(1) - distance, 0)
