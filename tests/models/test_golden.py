"""Agreement with the official PyTorch code, as a share of each array's largest magnitude.

In float64 to 1e-5, which leaves nothing but the rounding of the golden files, made in float32: the
same on every processor. In float32, as models are used, to 5e-5: processors round differently.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from hivit_jax.models import swin
from hivit_jax.models.positions import sincos_2d
from hivit_jax.models.units import to_rows_and_columns
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
TOLERANCE = {'float64': 1e-5, 'float32': 5e-5}


def cases(*names_and_options: tuple[str, Mapping[str, Any]]) -> pytest.MarkDecorator:
  """Each case in float64, the plain ones in float32 too."""
  found = []
  for name, options in names_and_options:
    for dtype in ['float64', 'float32'][: 1 if options else 2]:
      label = '-'.join([name, '+'.join(options) or 'plain', dtype])
      marks = pytest.mark.slow if dtype == 'float64' else ()
      found.append(pytest.param(name, options, dtype, id=label, marks=marks))
  return pytest.mark.parametrize(('name', 'options', 'dtype'), found)


class Golden:
  """One of our models with the parameters of a golden file, and the arrays of the file."""

  def __init__(self, model: str, config: dict, arrays: dict, dtype: str, unused=frozenset()):
    self.arrays, self.dtype = arrays, dtype
    size = config.pop('img_size')
    self._graphdef, abstract = abstract_model(model, image_size=size, dtype=dtype, **config)
    self._params = golden_params(abstract, arrays, set(unused))

  @property
  def images(self) -> np.ndarray:
    return self.arrays['image_nchw'].transpose(0, 2, 3, 1).astype(self.dtype)

  def gradients(self, loss) -> tuple[dict, Any]:
    """Of `loss(model) -> (value, results)`, with the results; float64 from beginning to end."""
    with jax.enable_x64(self.dtype == 'float64'):
      params = jax.tree.map(lambda x: np.asarray(x, self.dtype), self._params)
      derived = jax.grad(lambda params: loss(nnx.merge(self._graphdef, params)), has_aux=True)
      grads, results = jax.device_get(jax.jit(derived)(params))
    assert {x.dtype for x in jax.tree.leaves(grads)} == {np.dtype(self.dtype)}
    return grads, results

  def check(self, name: str, value: Any) -> None:
    assert_close(value, self.arrays[name], name=name, relative=TOLERANCE[self.dtype])

  def check_gradients(self, grads: dict, unused=frozenset()) -> None:
    grads = {f'grad/{name}': value for name, value in torch_gradients(grads).items()}
    unused = {f'grad/{name}' for name in unused}
    assert set(grads) - unused == {name for name in self.arrays if name.startswith('grad/')}
    for name, value in grads.items():
      if name in unused:
        assert not value.any(), name
      else:
        self.check(name, value)


@cases(('hivit_rpe', {}), ('hivit_norpe', {}), ('hivit_rpe', SCAN_REMAT))
def test_classifier(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  config.pop('ape')
  unused = {'relative_position_index'} if config['rpe'] else set()
  golden = Golden('hivit_tiny', config | options, arrays, dtype, unused)

  def loss(model):
    logits = model(golden.images)
    return (logits * arrays['logit_weights']).sum(), (logits, model.stages(golden.images))

  grads, (logits, stages) = golden.gradients(loss)
  golden.check('stage1', to_rows_and_columns(stages[0]))
  golden.check('stage2', to_rows_and_columns(stages[1]))
  golden.check('tokens', stages[2])
  golden.check('logits', logits)
  golden.check_gradients(grads)


@cases(
  ('mae_hifeat_normpix', {}),
  ('mae_hifeat_rawpix_r60', {}),
  ('mae_rpe_nohifeat', {}),
  ('mae_rpe_nohifeat', SCAN_REMAT),
)
def test_mae(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  unused = {'relative_position_index'} if config['rpe'] else set()
  if not config['hifeat']:  # in the file, but the official code never applies it
    unused |= {'norm.weight', 'norm.bias'}
  golden = Golden('mae_hivit_tiny', config | options, arrays, dtype, unused)

  def loss(model):
    out = model(golden.images, noise=arrays['noise'])
    return out.loss, out

  grads, out = golden.gradients(loss)
  np.testing.assert_array_equal(out.ids_keep, arrays['ids_keep'])
  np.testing.assert_array_equal(out.ids_restore, arrays['ids_restore'])
  np.testing.assert_array_equal(out.mask, arrays['mask'])
  golden.check('pred', out.pred)
  golden.check('loss', out.loss)
  golden.check_gradients(grads, unused={'decoder_pos_embed'})


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


@cases(('vit_mae', {}), ('vit_mae', SCAN_REMAT))
def test_mae_of_vit(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  config.pop('patch_size')
  golden = Golden('mae_vit_base', config | options, arrays, dtype)

  def loss(model):
    out = model(golden.images, noise=arrays['noise'])
    return out.loss, out

  grads, out = golden.gradients(loss)
  np.testing.assert_array_equal(out.mask, arrays['mask'])
  golden.check('pred', out.pred)
  golden.check('loss', out.loss)
  golden.check_gradients(grads, unused={'decoder_pos_embed', 'pos_embed'})


@cases(('swin', {}), ('swin', {'remat': True}))
def test_swin(name, options, dtype, monkeypatch):
  config, arrays = load_golden(f'{name}.npz')
  _use_masks_of(arrays, config, monkeypatch)
  config.pop('patch_size')
  golden = Golden('swin_tiny', config | options, arrays, dtype, _buffers(arrays))

  def loss(model):
    logits = model(golden.images)
    return (logits * arrays['logit_weights']).sum(), logits

  grads, logits = golden.gradients(loss)
  golden.check('logits', logits)
  golden.check_gradients(grads)


@cases(('simmim_swin', {}))
def test_simmim(name, options, dtype, monkeypatch):
  config, arrays = load_golden(f'{name}.npz')
  _use_masks_of(arrays, config, monkeypatch)
  for key in ('patch_size', 'num_classes', 'encoder_stride'):
    config.pop(key)
  golden = Golden('simmim_swin_tiny', config | options, arrays, dtype, _buffers(arrays))

  def loss(model):
    value = model.reconstruct(golden.images, arrays['mask'])[1]
    return value, value

  grads, value = golden.gradients(loss)
  golden.check('loss', value)
  golden.check_gradients(grads)


def test_sincos():
  with np.load(GOLDEN / 'sincos_pos_embed.npz') as file:
    for name, value in file.items():
      dim, side = (int(part[1:]) for part in name.split('_'))
      np.testing.assert_allclose(sincos_2d(dim, (side, side))[0], value, rtol=0, atol=1e-7)
