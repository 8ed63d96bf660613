"""Pictures for notebooks: what they are drawn from, against the model itself."""

import jax
import numpy as np
import pytest
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import inside
from hivit_jax.tasks import reconstruction
from hivit_jax.tools import feature_sheets, looking, pictures
from tests.helpers import TINY_VIT, assert_close, random_model

OWN = {'mean': (0.6, 0.4, 0.5), 'std': (0.2, 0.3, 0.4)}
DECODER = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)  # 2x2 units


@pytest.fixture(scope='module')
def model():
  return nnx.merge(*random_model('mae_vit_base', **TINY_VIT, **DECODER))


@pytest.fixture(scope='module')
def look(model):
  return pictures.Look(model, IMAGES, names=['a', 'b'], **OWN)


def test_what_it_computes_is_the_models(look, model):
  images = (IMAGES / 255 - OWN['mean']) / OWN['std']
  seen = jax.jit(inside.look)(model, images.astype(np.float32))
  for i in range(2):
    assert len(look.maps[i]) == len(seen.maps)
    for found, expected in zip(look.maps[i], seen.maps, strict=True):
      assert_close(found, expected[i], relative=1e-4)
    assert_close(look.attention[i], seen.attention[-1][i], relative=1e-4)


def test_attention_over_the_image_is_that_of_all_units_or_of_the_only_window():
  everywhere = np.random.default_rng(0).random((2, 4, 4))  # 2 heads, 4 units
  for block in (everywhere, everywhere[None]):
    np.testing.assert_array_equal(looking.of_image(block, 4), everywhere)
  assert looking.of_image(everywhere[None], 3) is None  # the window is padded
  assert looking.of_image(np.ones((4, 2, 1, 1)), 4) is None


def test_what_is_drawn(look, monkeypatch):
  drawn = {}

  def record(sheet):
    return lambda *given: drawn.update({sheet: given})

  for sheet in ('attention', 'similarity'):
    monkeypatch.setattr(feature_sheets, sheet, record(sheet))
  look.attending([(1, 0), (0, 1)])
  looked, units, *_ = drawn['attention']
  assert (looked[1].path, units) == ('b', [(1, 0), (0, 1)])
  columns = [1 + 2, 1 + 1]  # after a class token
  np.testing.assert_array_equal(looked[1].attention, look.attention[1][:, columns])
  look.similarity((20, 4))
  _, maps, point, _ = drawn['similarity']
  assert point == (20, 4)
  assert maps[0][0][0, 1] == pytest.approx(1)
  assert np.max(maps[1][0]) < 1


def test_pictures_have_a_row_an_image(look):
  assert look.components().height > 2 * 128


def test_reconstructions_are_as_asked_for(model, monkeypatch):
  images = IMAGES / np.float32(255)
  asked = {}

  class Reconstructor:
    def __init__(self, graphdef, **options):
      asked.update(options, model=graphdef)

    def __call__(self, params, images, *, seed):
      asked.update(params=params, images=images, seed=seed)
      pixels, mask = images, np.ones((2, 4))
      return reconstruction.assemble(images, pixels, mask, norm_pix=True, **OWN)

  monkeypatch.setattr(pictures, 'Reconstructor', Reconstructor)
  picture = pictures.reconstruction(model, images, seed=1, mask_ratio=0.5, **OWN)
  assert picture.height > 2 * 128
  assert {key: asked[key] for key in ('seed', 'mask_ratio', 'mean', 'std')} == {
    'seed': 1, 'mask_ratio': 0.5, **OWN
  }  # fmt: skip
  assert asked['images'] is images
  assert type(nnx.merge(asked['model'], asked['params'])) is type(model)


def test_places_that_are_not_there(look):
  with pytest.raises(UserError, match=r'units: \(2, 0\) is none of the 2 rows and 2 columns'):
    look.attending([(0, 0), (2, 0)])
  with pytest.raises(UserError, match=r'point=\(32, 0\): the first image is 32 pixels wide'):
    look.similarity((32, 0))
