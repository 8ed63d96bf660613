"""What gathers do besides what plain indexing does."""

import numpy as np

from hivit_jax.ops.gather import units_fast


def test_a_position_outside_gives_nan():
  assert np.isnan(units_fast(np.ones((1, 4, 2), np.float32), np.array([[1, 4]]))[0, 1]).all()
