"""What the layers do on other platforms than that of the tests."""

import numpy as np

from hivit_jax.models import layers


def test_what_tpus_do_with_queries_keys_and_values():
  """They take one array apart and join it by other steps, with the same result."""
  qkv = np.random.default_rng(0).standard_normal((2, 7, 5, 3, 4, 8), np.float32)
  parts = layers._split_columns(qkv)
  for part, expected in zip(parts, layers._split(qkv), strict=True):
    assert part.shape == (2, 7, 4, 5, 8)
    np.testing.assert_array_equal(part, expected)
  for join in (layers._join, layers._join_columns):
    np.testing.assert_array_equal(join(*parts), qkv)
