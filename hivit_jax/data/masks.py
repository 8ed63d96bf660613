"""Masks of objects on the host: crops for training, and pasting what a model predicts."""

import numpy as np

CROP = 112  # cells along a side of a crop, as in `detection.mask_targets`


def coverage_weights(start: float, stop: float, cells: int, pixels: int) -> np.ndarray:
  """Share of each pixel in each of `cells` equal parts of [start, stop]: (cells, pixels) float32.

  Rows add up to 1 where the part is inside the image.
  """
  edges = np.linspace(start, stop, cells + 1)
  low, high = edges[:-1, None], edges[1:, None]
  pixel = np.arange(pixels)
  common = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
  width = np.maximum(high - low, 1e-9)
  return (np.maximum(common, 0) / width).astype(np.float32)


def crop(mask: np.ndarray, box: np.ndarray, side: int = CROP) -> np.ndarray:
  """Coverage of a mask within a box.

  Args:
    mask: (height, width) of 0 and 1.
    box: (4,) x1, y1, x2, y2 in pixels.
    side: rows and columns of the result.

  Returns:
    (side, side) uint8: 255 where a cell is covered completely.
  """
  x1, y1, x2, y2 = (float(value) for value in box)
  top, bottom = max(int(np.floor(y1)), 0), min(int(np.ceil(y2)), mask.shape[0])
  left, right = max(int(np.floor(x1)), 0), min(int(np.ceil(x2)), mask.shape[1])
  within = mask[top:bottom, left:right].astype(np.float32)
  down = coverage_weights(y1 - top, y2 - top, side, within.shape[0])
  across = coverage_weights(x1 - left, x2 - left, side, within.shape[1])
  return np.rint(255 * np.clip(down @ within @ across.T, 0, 1)).astype(np.uint8)


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
