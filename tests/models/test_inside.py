"""What models compute on their way is what they compute with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.models import inside
from hivit_jax.ops.choice import FAST
from tests.helpers import (
  TINY,
  TINY_SWIN,
  TINY_VIT,
  assert_close,
  random_images,
  random_model,
)


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('hivit_tiny', TINY | {'depths': (1, 1, 1)}),  # with relative position bias
    ('fast_itpn_tiny', TINY | {'depths': (1, 1, 1)}),
    ('vit_base', TINY_VIT),
  ],
)
def test_a_blocks_output_follows_from_its_attention(name, options):
  graphdef, params = random_model(name, **options)
  model = nnx.merge(graphdef, params)
  images = jnp.asarray(random_images(2, *model.image_size, 3))
  (attention,) = jax.jit(lambda model, images: inside.look(model, images).attention)(model, images)
  block = model.blocks[-1]
  # The input of the only block with attention, from a model without it.
  shorter = nnx.merge(graphdef, params)
  shorter.blocks = nnx.List([*shorter.blocks[:-1], _Identity()])
  x = shorter.forward_features(images)
  heads = attention.shape[1]
  v = jnp.split(block.attn.qkv(block.norm1(x)), 3, axis=-1)[2]
  v = np.asarray(v).reshape(*v.shape[:2], heads, -1)
  mixed = np.einsum('bhqk,bkhd->bqhd', attention, v).reshape(x.shape)
  scale = [1 if gamma is None else gamma[...] for gamma in (block.gamma_1, block.gamma_2)]
  x = x + scale[0] * block.attn.proj(mixed)
  x = x + scale[1] * block.mlp(block.norm2(x))
  assert_close(x, model.forward_features(images))
  assert_close(attention.sum(axis=-1), np.ones(attention.shape[:3]), relative=1e-6)
  assert np.asarray(attention).std(axis=-1).min() > 1e-4  # and no row is the same everywhere


class _Identity(nnx.Module):
  def __call__(self, x, *args, rate=0.0, noise=None):
    return x


def test_maps_are_the_models_at_any_size_and_the_model_stays_as_it_is():
  graphdef, params = random_model('mae_hivit_tiny', **TINY, scan=True, remat=True)
  model = nnx.merge(graphdef, params)
  images = jnp.asarray(random_images(1, 96, 32, 3))
  found = jax.jit(inside.look)(model, images)
  for actual, expected in zip(found.maps, model.features(images), strict=True):
    assert_close(actual, expected)
  assert [x.shape for x in found.attention] == [(1, 4, 12, 12)] * 2
  inside.look(model, images)
  assert model.ops == FAST
  assert model.settings.scan


def test_windows_and_the_single_window_of_a_small_map():
  graphdef, params = random_model('swin_tiny', **TINY_SWIN)
  model = nnx.merge(graphdef, params)
  images = jnp.asarray(random_images(1, 32, 32, 3))
  found = jax.eval_shape(lambda: inside.look(model, images))
  assert [x.shape for x in found.attention] == [(1, 4, 1, 16, 16)] * 2 + [(1, 1, 2, 16, 16)]
  assert [x.shape for x in found.maps] == [(1, 8, 8, 8), (1, 4, 4, 16)]
  assert inside.grid_of(model, (32, 32)) == (4, 4)
