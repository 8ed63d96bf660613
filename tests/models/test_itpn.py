"""iTPN's pyramid: of the kept units only, and of images of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.errors import UserError
from tests.helpers import (
  TINY,
  TINY_MAE,
  abstract_model,
  assert_close,
  random_images,
  random_model,
)

OWN = {'fpn_dim': 12, 'fpn_depth': 1}


def test_the_pyramid_of_a_unit_needs_no_other_unit():
  model = nnx.merge(*random_model('mae_itpn_base', **TINY_MAE, **OWN))
  stages = model.stages(random_images(2, 64, 64, 3))
  ids = np.array([[3, 8], [15, 0]])
  pick = lambda x: x[np.arange(2)[:, None], ids]  # noqa: E731
  run = jax.jit(lambda *stages: model.pyramid(*stages))
  for some, everything in zip(run(*map(pick, stages)), run(*stages), strict=True):
    assert_close(some, pick(np.asarray(everything)), relative=2e-6)


def test_moved_positions_are_for_kept_units_only_and_have_the_gradient_of_a_copy():
  """What PyTorch does on a CPU; on a GPU, and here by default, nothing moves."""
  graphdef, params = random_model('mae_itpn_base', **TINY_MAE, **OWN, position_overhang=0.1)
  moved = nnx.merge(graphdef, params)
  plain = nnx.merge(abstract_model('mae_itpn_base', **TINY_MAE, **OWN)[0], params)
  images, ids = random_images(1, 64, 64, 3), np.arange(16)[None]
  tokens = lambda model, ids=None: jax.jit(lambda x: model.forward_features(x, ids))(images)  # noqa: E731
  np.testing.assert_array_equal(tokens(moved), tokens(plain))
  assert_close(tokens(plain, ids), tokens(plain), relative=2e-6)
  assert np.abs(tokens(moved, ids) - tokens(plain)).max() > 1e-3


def test_levels_of_a_detector_and_of_a_segmenter_at_any_size():
  images = jnp.zeros((1, 96, 128, 3))
  for options, channels in (({}, [12] * 5), ({'join_stages': True}, [20, 28, 44, 44])):
    model = nnx.merge(*abstract_model('backbone_itpn_base', **TINY, **OWN, **options))
    maps = nnx.eval_shape(lambda model: model(images), model)
    assert [x.shape[1:] for x in maps] == [
      (96 // info.stride, 128 // info.stride, info.channels) for info in model.feature_info
    ]
    assert [info.channels for info in model.feature_info] == channels
  shapes = nnx.eval_shape(lambda model: model(images, (3, 1)), model)
  assert [x.shape[1] for x in shapes] == [6, 24]


@pytest.mark.parametrize(
  ('levels', 'message'),
  [
    ((1, 6), r'levels must be some of 1 to 5, got \(1, 6\)'),
    (None, 'level 5 has a stride of 64 pixels'),
  ],
)
def test_levels_that_there_are_not(levels, message):
  model = nnx.merge(*random_model('backbone_itpn_base', **TINY, **OWN))
  with pytest.raises(UserError, match=message):
    model(random_images(1, 48, 48, 3), levels)


def test_the_decoders_width_must_divide_into_cells():
  options = TINY_MAE | OWN | {'decoder_embed_dim': 24}
  with pytest.raises(UserError, match='decoder_embed_dim=24 is not a multiple of 16'):
    abstract_model('mae_itpn_base', **options)
