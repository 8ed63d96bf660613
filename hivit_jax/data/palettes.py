"""Colours of classes."""

import numpy as np


def distinct(count: int) -> np.ndarray:
  """Returns colours that can be told apart: (count, 3) uint8, the first one black.

  These are the colours of PASCAL VOC, whose bits come from those of the class's index.

  Args:
    count: number of classes; colours repeat after 256.
  """
  index = np.arange(count)
  colours = np.zeros((count, 3), np.int64)
  for bit in range(8):
    for channel in range(3):
      colours[:, channel] |= (index >> 3 * bit + channel & 1) << 7 - bit
  return colours.astype(np.uint8)
