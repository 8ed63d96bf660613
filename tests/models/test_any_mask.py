"""A program for masks of any count agrees with those that leave removed units out."""

import jax
import numpy as np
import pytest
from flax import nnx

from hivit_jax.models import any_mask
from tests.helpers import TINY, TINY_SWIN, TINY_VIT, assert_close, random_images, random_model

DECODER = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}
SHALLOW = TINY | DECODER | {'depths': (1, 1, 1)}
MODELS = {
  'mae_hivit_tiny': SHALLOW | {'rpe': True},
  'mae_itpn_base': SHALLOW | {'fpn_dim': 16, 'position_overhang': 0.1},
  'mae_vit_base': TINY_VIT | DECODER,
  'simmim_swin_tiny': TINY_SWIN,
}


@pytest.mark.parametrize('name', MODELS)
def test_removed_units_are_predicted_as_in_training(name):
  graphdef, params = random_model(name, **MODELS[name])
  height, width = nnx.merge(graphdef, params).image_size
  images = random_images(2, height, width, 3)

  @jax.jit
  def both(params, images, noise):
    model = nnx.merge(graphdef, params)
    out = model(images, noise=noise)
    return out.pred, out.mask, any_mask.predict(model, images, out.mask)

  units = np.prod(nnx.merge(graphdef, params).grid)
  expected, mask, found = both(params, images, np.random.default_rng(0).random((2, units)))
  removed = np.asarray(mask, bool)
  assert 0 < removed.mean() < 1
  assert_close(found[removed], expected[removed], relative=1e-4)
