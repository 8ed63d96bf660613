"""Agreement with the official PyTorch code, to 1e-5 of each array's largest magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.models.hivit import to_rows_and_columns
from hivit_jax.models.positions import sincos_2d
from tests.helpers import GOLDEN, assert_close, load_golden, set_params, torch_gradients

FORMS = [{}, {'scan': True}, {'remat': True}, {'scan': True, 'remat': True}]
form = pytest.mark.parametrize('options', FORMS, ids=lambda o: '+'.join(o) or 'plain')


def _check_gradients(loss, model, arrays, unused=frozenset()):
  graphdef, state = nnx.split(model)
  params = nnx.to_pure_dict(state)
  grads = torch_gradients(jax.jit(jax.grad(lambda p: loss(nnx.merge(graphdef, p))))(params))
  expected = {k.removeprefix('grad/'): v for k, v in arrays.items() if k.startswith('grad/')}
  assert set(grads) - set(expected) == set(unused)
  for name, value in expected.items():
    assert_close(grads[name], value, name=name)
  for name in unused:
    assert not grads[name].any(), name


@form
@pytest.mark.parametrize('name', ['hivit_rpe', 'hivit_norpe'])
def test_classifier(name, options):
  config, arrays = load_golden(f'{name}.npz')
  config.pop('ape')
  config['image_size'] = config.pop('img_size')
  model = hivit_jax.create_model('hivit_tiny', **config, **options)
  set_params(model, arrays, unused={'relative_position_index'} if config['rpe'] else set())
  images = jnp.asarray(arrays['image_nchw'].transpose(0, 2, 3, 1))
  stage1, stage2, tokens = model.encode(images)
  assert_close(to_rows_and_columns(stage1), arrays['stage1'], name='stage1')
  assert_close(to_rows_and_columns(stage2), arrays['stage2'], name='stage2')
  assert_close(tokens, arrays['tokens'], name='tokens')
  assert_close(model(images), arrays['logits'], name='logits')
  _check_gradients(lambda m: (m(images) * arrays['logit_weights']).sum(), model, arrays)


@form
@pytest.mark.parametrize(
  'name', ['mae_hifeat_normpix', 'mae_hifeat_rawpix_r60', 'mae_rpe_nohifeat']
)
def test_mae(name, options):
  config, arrays = load_golden(f'{name}.npz')
  config['image_size'] = config.pop('img_size')
  model = hivit_jax.create_model('mae_hivit_tiny', **config, **options)
  unused = {'relative_position_index'} if config['rpe'] else set()
  if not config['hifeat']:  # in the file, but the official code never applies it
    unused |= {'norm.weight', 'norm.bias'}
  set_params(model, arrays, unused=unused)
  images = jnp.asarray(arrays['image_nchw'].transpose(0, 2, 3, 1))
  out = jax.jit(lambda noise: model(images, noise=noise))(arrays['noise'])
  np.testing.assert_array_equal(out.ids_keep, arrays['ids_keep'])
  np.testing.assert_array_equal(out.ids_restore, arrays['ids_restore'])
  np.testing.assert_array_equal(out.mask, arrays['mask'])
  assert_close(out.pred, arrays['pred'], name='pred')
  assert_close(out.loss, arrays['loss'], name='loss')
  _check_gradients(
    lambda m: m(images, noise=arrays['noise']).loss, model, arrays, unused={'decoder_pos_embed'}
  )


def test_sincos():
  with np.load(GOLDEN / 'sincos_pos_embed.npz') as file:
    for name, value in file.items():
      dim, side = (int(part[1:]) for part in name.split('_'))
      np.testing.assert_allclose(sincos_2d(dim, (side, side))[0], value, rtol=0, atol=1e-7)
