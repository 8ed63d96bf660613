"""Agreement with the official PyTorch code, to 1e-5 of each array's largest magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.models import swin
from hivit_jax.models.hivit import to_rows_and_columns
from hivit_jax.models.positions import sincos_2d
from tests.helpers import (
  GOLDEN,
  abstract_model,
  assert_close,
  golden_params,
  load_golden,
  torch_gradients,
)

# The other forms' outputs and gradients are compared with the plain one's in test_hivit, test_mae.
SCAN_REMAT = {'scan': True, 'remat': True}


def _check_gradients(grads, arrays, unused=frozenset()):
  grads = torch_gradients(grads)
  expected = {k.removeprefix('grad/'): v for k, v in arrays.items() if k.startswith('grad/')}
  assert set(grads) - set(expected) == unused
  for name, value in expected.items():
    assert_close(grads[name], value, name=name)
  for name in unused:
    assert not grads[name].any(), name


@pytest.mark.parametrize(
  ('name', 'options'),
  [('hivit_rpe', {}), ('hivit_norpe', {}), ('hivit_rpe', SCAN_REMAT)],
  ids=lambda value: value if isinstance(value, str) else '+'.join(value) or 'plain',
)
def test_classifier(name, options):
  config, arrays = load_golden(f'{name}.npz')
  config.pop('ape')
  graphdef, abstract = abstract_model(
    'hivit_tiny', image_size=config.pop('img_size'), **config, **options
  )
  unused = {'relative_position_index'} if config['rpe'] else set()
  params = golden_params(abstract, arrays, unused)
  images = arrays['image_nchw'].transpose(0, 2, 3, 1)

  def loss(params):
    model = nnx.merge(graphdef, params)
    logits = model(images)
    return (logits * arrays['logit_weights']).sum(), (logits, model.encode(images))

  grads, (logits, stages) = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert_close(to_rows_and_columns(stages[0]), arrays['stage1'], name='stage1')
  assert_close(to_rows_and_columns(stages[1]), arrays['stage2'], name='stage2')
  assert_close(stages[2], arrays['tokens'], name='tokens')
  assert_close(logits, arrays['logits'], name='logits')
  _check_gradients(grads, arrays)


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('mae_hifeat_normpix', {}),
    ('mae_hifeat_rawpix_r60', {}),
    ('mae_rpe_nohifeat', {}),
    ('mae_rpe_nohifeat', SCAN_REMAT),
  ],
  ids=lambda value: value if isinstance(value, str) else '+'.join(value) or 'plain',
)
def test_mae(name, options):
  config, arrays = load_golden(f'{name}.npz')
  graphdef, abstract = abstract_model(
    'mae_hivit_tiny', image_size=config.pop('img_size'), **config, **options
  )
  unused = {'relative_position_index'} if config['rpe'] else set()
  if not config['hifeat']:  # in the file, but the official code never applies it
    unused |= {'norm.weight', 'norm.bias'}
  params = golden_params(abstract, arrays, unused)
  images = arrays['image_nchw'].transpose(0, 2, 3, 1)

  def loss(params):
    out = nnx.merge(graphdef, params)(images, noise=arrays['noise'])
    return out.loss, out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_array_equal(out.ids_keep, arrays['ids_keep'])
  np.testing.assert_array_equal(out.ids_restore, arrays['ids_restore'])
  np.testing.assert_array_equal(out.mask, arrays['mask'])
  assert_close(out.pred, arrays['pred'], name='pred')
  assert_close(out.loss, arrays['loss'], name='loss')
  _check_gradients(grads, arrays, unused={'decoder_pos_embed'})


def _buffers(arrays):
  """Constants in Swin's files that are computed here when needed."""
  names = (name.removeprefix('param/') for name in arrays)
  return {name for name in names if name.endswith(('relative_position_index', 'attn_mask'))}


def _use_masks_of(arrays, config, monkeypatch):
  """The files were made with random numbers in all state, masks included; these, test_swin has."""
  masks = {}
  for name in _buffers(arrays):
    if name.endswith('attn_mask'):
      stage = int(name.split('layers.')[1].split('.')[0])
      side = config['img_size'] // config['patch_size'] >> stage
      masks[side, side] = arrays[f'param/{name}']
  assert len(masks) == 2
  monkeypatch.setattr(swin, 'shift_mask', lambda grid, *_: masks[grid])


@pytest.mark.parametrize('options', [{}, SCAN_REMAT], ids=['plain', 'scan+remat'])
def test_mae_of_vit(options):
  config, arrays = load_golden('vit_mae.npz')
  config.pop('patch_size')
  graphdef, abstract = abstract_model(
    'mae_vit_base', image_size=config.pop('img_size'), **config, **options
  )
  params = golden_params(abstract, arrays, set())

  def loss(params):
    out = nnx.merge(graphdef, params)(
      arrays['image_nchw'].transpose(0, 2, 3, 1), noise=arrays['noise']
    )
    return out.loss, out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_array_equal(out.mask, arrays['mask'])
  assert_close(out.pred, arrays['pred'], name='pred')
  assert_close(out.loss, arrays['loss'], name='loss')
  _check_gradients(grads, arrays, unused={'decoder_pos_embed', 'pos_embed'})


@pytest.mark.parametrize('options', [{}, {'remat': True}], ids=['plain', 'remat'])
def test_swin(options, monkeypatch):
  config, arrays = load_golden('swin.npz')
  _use_masks_of(arrays, config, monkeypatch)
  config.pop('patch_size')
  graphdef, abstract = abstract_model(
    'swin_tiny', image_size=config.pop('img_size'), **config, **options
  )
  params = golden_params(abstract, arrays, _buffers(arrays))

  def loss(params):
    logits = nnx.merge(graphdef, params)(arrays['image_nchw'].transpose(0, 2, 3, 1))
    return (logits * arrays['logit_weights']).sum(), logits

  grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert_close(logits, arrays['logits'], name='logits')
  _check_gradients(grads, arrays)


def test_simmim(monkeypatch):
  """In float64: of 1e-5, rounding takes 9e-6 in the file and would take 7e-6 here in float32."""
  config, arrays = load_golden('simmim_swin.npz')
  _use_masks_of(arrays, config, monkeypatch)
  for name in ('patch_size', 'num_classes', 'encoder_stride'):
    config.pop(name)
  graphdef, abstract = abstract_model(
    'simmim_swin_tiny', image_size=config.pop('img_size'), dtype=jnp.float64, **config
  )
  params = golden_params(abstract, arrays, _buffers(arrays))
  images = arrays['image_nchw'].transpose(0, 2, 3, 1)

  def loss(params):
    return nnx.merge(graphdef, params).reconstruct(images, arrays['mask'])[1]

  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert_close(value, arrays['loss'], name='loss')
  _check_gradients(grads, arrays)


def test_sincos():
  with np.load(GOLDEN / 'sincos_pos_embed.npz') as file:
    for name, value in file.items():
      dim, side = (int(part[1:]) for part in name.split('_'))
      np.testing.assert_allclose(sincos_2d(dim, (side, side))[0], value, rtol=0, atol=1e-7)
