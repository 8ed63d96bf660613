"""Resizing of position parameters against independent implementations."""

import jax
import numpy as np
import pytest
from scipy import interpolate

from hivit_jax.models import resize
from tests.helpers import assert_close

torch = pytest.importorskip('torch')


@pytest.mark.parametrize(
  ('source', 'target'),
  [
    ((14, 14), (24, 24)),
    ((4, 4), (6, 10)),
    ((6, 10), (3, 7)),
    ((14, 14), (5, 5)),
    ((1, 1), (2, 3)),
  ],
)
def test_position_embeddings_are_resized_as_torch_does(source, target):
  embedding = np.random.default_rng(0).standard_normal((1, source[0] * source[1], 8), np.float32)
  nchw = torch.from_numpy(embedding.reshape(1, *source, 8).transpose(0, 3, 1, 2).copy())
  expected = torch.nn.functional.interpolate(
    nchw, size=target, mode='bicubic', align_corners=False
  ).numpy()
  expected = expected.transpose(0, 2, 3, 1).reshape(1, -1, 8)
  assert_close(resize.position_embedding(embedding, source, target), expected, relative=2e-6)
  jitted = jax.jit(lambda x: resize.position_embedding(x, source, target))(embedding)
  assert_close(jitted, expected, relative=2e-6)


def stretched(source, target):
  """Offsets of the source's table in units of the target, by plain search."""
  growths = np.linspace(1.01, 1.5, 500001)
  powers = np.arange(source - 1)
  last = (growths ** (source - 1) - 1) / (growths - 1)
  growth = growths[np.abs(last - (target - 1)).argmin()]
  far = np.cumsum(growth**powers)
  return np.concatenate([-far[::-1], [0], far])


@pytest.mark.parametrize(
  ('source', 'target'),
  [((14, 14), (24, 24)), ((14, 14), (40, 40)), ((4, 6), (7, 5)), ((5, 5), (3, 9))],
)
def test_bias_tables_are_cubic_splines_over_a_geometric_sequence(source, target):
  size = [2 * side - 1 for side in source]
  table = np.random.default_rng(1).standard_normal((size[0] * size[1], 3))
  known = [stretched(*sides) for sides in zip(source, target, strict=True)]
  wanted = [np.arange(1 - side, side) for side in target]
  expected = np.stack(
    [
      interpolate.RectBivariateSpline(*known, head.reshape(size), kx=3, ky=3, s=0)(*wanted).ravel()
      for head in table.T
    ],
    axis=1,
  )
  assert_close(resize.bias_table(table, source, target), expected, relative=2e-4)


def test_bias_of_the_same_unit_and_near_neighbours_keeps_its_meaning():
  table = np.random.default_rng(2).standard_normal((27 * 27, 2))
  grown = resize.bias_table(table, (14, 14), (24, 24)).reshape(47, 47, 2)
  table = table.reshape(27, 27, 2)
  np.testing.assert_allclose(grown[23, 23], table[13, 13], atol=1e-6)
  np.testing.assert_allclose(grown[22:25, 22:25], table[12:15, 12:15], atol=1e-6)


@pytest.mark.parametrize('target', [(1, 1), (2, 2), (1, 4), (5, 2)])
def test_the_smallest_tables_can_be_resized(target):
  for side in (1, 2, 3):
    table = np.ones(((2 * side - 1) ** 2, 1), np.float32)
    grown = resize.bias_table(table, (side, side), target)
    assert grown.shape == ((2 * target[0] - 1) * (2 * target[1] - 1), 1)
    np.testing.assert_allclose(grown, 1, atol=1e-5)


def test_equal_grids_change_nothing():
  embedding = np.ones((1, 6, 2), np.float32)
  assert resize.position_embedding(embedding, (2, 3), (2, 3)) is embedding
  assert resize.bias_table(embedding[0], (2, 3), (2, 3)).base is embedding
