"""The table of relative positions."""

import numpy as np

from hivit_jax.ops import relative_position


def test_relative_position_index_follows_the_formula():
  rows, columns = 2, 3
  index = relative_position.index(np.arange(6), (rows, columns))
  for i in range(6):
    for j in range(6):
      (y, x), (v, u) = divmod(i, columns), divmod(j, columns)
      assert index[i, j] == (y - v + rows - 1) * (2 * columns - 1) + (x - u + columns - 1)
  assert set(index.ravel()) == set(range(3 * 5))
