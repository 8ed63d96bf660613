"""Agreement with the official PyTorch code, as a share of each array's largest magnitude.

In float64 to 1e-5, which leaves nothing but the rounding of the golden files, made in float32: the
same on every processor. In float32, as models are used, to 5e-5: processors round differently. One
file of each family does for that: it has all the layers of the family. HiViT's are compiled with
all optimisations then, as for users.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.interop import fast_itpn
from hivit_jax.models import swin, targets
from hivit_jax.models.positions import sincos_2d
from hivit_jax.models.units import join_units, to_rows_and_columns
from tests.helpers import (
  GOLDEN,
  abstract_model,
  assert_close,
  golden_params,
  load_golden,
  optimized,
  torch_gradients,
)

# The other forms' outputs and gradients are compared with the plain one's in test_hivit, test_mae.
SCAN_REMAT = {'scan': True, 'remat': True}
TOLERANCE = {'float64': 1e-5, 'float32': 5e-5}
OPTIMIZED = {'hivit_rpe', 'mae_hifeat_normpix'}
FLOAT32 = OPTIMIZED | {
  *('vit_mae', 'simmim_swin', 'fast_itpn', 'itpn_pixel', 'saratrx_target'),
}


def cases(*names_and_options: tuple[str, Mapping[str, Any]]) -> pytest.MarkDecorator:
  """Each case in float64, the plain ones of `FLOAT32` in that, too."""
  found = []
  for name, options in names_and_options:
    for dtype in ['float64', 'float32'] if name in FLOAT32 and not options else ['float64']:
      label = '-'.join([name, '+'.join(options) or 'plain', dtype])
      marks = pytest.mark.slow if options or dtype == 'float32' else ()
      found.append(pytest.param(name, options, dtype, id=label, marks=marks))
  return pytest.mark.parametrize(('name', 'options', 'dtype'), found)


class Golden:
  """One of our models with the parameters of a golden file, and the arrays of the file."""

  def __init__(
    self,
    model: str,
    config: dict,
    arrays: dict,
    dtype: str,
    unused=frozenset(),
    *,
    optimize: bool = False,
  ):
    self.arrays, self.dtype, self._optimize = arrays, dtype, optimize and dtype == 'float32'
    size = config.pop('img_size')
    self._graphdef, abstract = abstract_model(model, image_size=size, dtype=dtype, **config)
    self._params = golden_params(abstract, arrays, set(unused))

  def outputs(self, function: Callable, transform: Callable = lambda function: function) -> Any:
    """What `function(model, images)` gives, of one type from beginning to end.

    Args:
      function: of a model and the file's images, (B, H, W, C).
      transform: of the function of parameters and images that this makes, such as `jax.grad`.
    """
    images = self.arrays['image_nchw'].transpose(0, 2, 3, 1).astype(self.dtype)
    params = jax.tree.map(lambda x: np.asarray(x, self.dtype), self._params)
    compiling = optimized() if self._optimize else contextlib.nullcontext()
    with jax.enable_x64(self.dtype == 'float64'), compiling:
      transformed = transform(lambda params, x: function(nnx.merge(self._graphdef, params), x))
      return jax.device_get(jax.jit(transformed)(params, images))

  def gradients(self, loss: Callable) -> tuple[dict, Any]:
    """Of `loss(model, images) -> (value, results)`, with the results."""
    grads, results = self.outputs(loss, functools.partial(jax.grad, has_aux=True))
    assert {x.dtype for x in jax.tree.leaves(grads)} == {np.dtype(self.dtype)}
    return grads, results

  def check(self, name: str, value: Any) -> None:
    assert_close(value, self.arrays[name], name=name, relative=TOLERANCE[self.dtype])

  def check_gradients(self, grads: dict, unused=frozenset(), layout: Callable = dict) -> None:
    """All but those of `unused`, which are zero; `layout` gives them the names of the file."""
    grads = {f'grad/{name}': value for name, value in layout(torch_gradients(grads)).items()}
    unused = {f'grad/{name}' for name in unused}
    assert set(grads) - unused == {name for name in self.arrays if name.startswith('grad/')}
    for name, value in grads.items():
      if name in unused:
        assert not value.any(), name
      else:
        self.check(name, value)


@cases(('hivit_rpe', {}), ('hivit_norpe', {}))
def test_classifier(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  config.pop('ape')
  unused = {'relative_position_index'} if config['rpe'] else set()
  golden = Golden('hivit_tiny', config | options, arrays, dtype, unused, optimize=name in OPTIMIZED)

  def loss(model, images):
    logits = model(images)
    return (logits * arrays['logit_weights']).sum(), (logits, model.stages(images))

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
)
def test_mae(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  unused = {'relative_position_index'} if config['rpe'] else set()
  if not config['hifeat']:  # in the file, but the official code never applies it
    unused |= {'norm.weight', 'norm.bias'}
  golden = Golden(
    'mae_hivit_tiny', config | options, arrays, dtype, unused, optimize=name in OPTIMIZED
  )

  def loss(model, images):
    out = model(images, noise=arrays['noise'])
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

  def loss(model, images):
    out = model(images, noise=arrays['noise'])
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

  def loss(model, images):
    logits = model(images)
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

  def loss(model, images):
    value = model.reconstruct(images, arrays['mask'])[1]
    return value, value

  grads, value = golden.gradients(loss)
  golden.check('loss', value)
  golden.check_gradients(grads)


@cases(('fast_itpn', {}), ('fast_itpn', SCAN_REMAT))
def test_fast_itpn(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  state = {k.removeprefix('param/'): v for k, v in arrays.items() if k.startswith('param/')}
  params = {f'param/{k}': v for k, v in fast_itpn.joined(state).items()}
  others = {k: v for k, v in arrays.items() if not k.startswith(('param/', 'pretrain/'))}
  options = options | {key: config[key] for key in ('embed_dim', 'num_heads', 'num_classes')}
  options['img_size'] = config['img_size']
  options['depths'] = tuple(config[key] for key in ('depth_stage1', 'depth_stage2', 'depth'))
  golden = Golden('fast_itpn_tiny', options, params | others, dtype)

  def loss(model, images):
    logits = model(images)
    return (logits * arrays['logit_weights']).sum(), (logits, model.stages(images))

  grads, (logits, stages) = golden.gradients(loss)
  for key, stage in zip(('stage1', 'stage2'), stages, strict=False):
    golden.check(key, join_units(to_rows_and_columns(stage), (4, 4)).transpose(0, 3, 1, 2))
  golden.check('tokens', stages[2])
  golden.check('logits', logits)
  golden.check_gradients(grads, layout=fast_itpn.split)
  keys = np.split(grads['blocks'][5]['attn']['qkv']['bias'], 3)[1]
  assert np.abs(keys).max() < 1e-5 * np.abs(arrays['grad/blocks.5.attn.q_bias']).max()


@cases(('itpn_clip', {}), ('itpn_clip', SCAN_REMAT))
def test_classifier_of_itpn_clip(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  start = 'classifier/'
  heads = {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}
  unused = {
    key.removeprefix('param/')
    for key in arrays
    if re.match(r'param/(?!patch_embed|blocks|absolute_pos_embed)', key)
  }
  options = options | {key: config[key] for key in ('embed_dim', 'num_heads', 'num_classes')}
  options |= {'depths': (2, 1, config['depth']), 'layer_scale': 0.5, 'img_size': 64}
  options['stem_blocks'] = config['mlp_depth1'], config['mlp_depth2']
  encoder = {k: v for k, v in arrays.items() if k.startswith(('param/', 'image'))}
  golden = Golden('hivit_tiny', options, encoder | heads, dtype, unused)

  def loss(model, images):
    logits = model(images)
    return (logits * heads['logit_weights']).sum(), (logits, model.stages(images))

  grads, (logits, stages) = golden.gradients(loss)
  golden.check('stage1', to_rows_and_columns(stages[0]))
  golden.check('stage2', to_rows_and_columns(stages[1]))
  golden.check('tokens', stages[2])
  golden.check('logits', logits)
  golden.check_gradients(grads)


def _itpn_options(config):
  options = {key: config[key] for key in ('embed_dim', 'num_heads', 'fpn_dim', 'fpn_depth')}
  return options | {'depths': (2, 2, config['depth']), 'stem_blocks': (3, 3), 'img_size': 64}


def _order(levels):
  return [to_rows_and_columns(level) for level in levels]


@cases(('itpn_pixel', {}), ('itpn_pixel', SCAN_REMAT))
def test_itpn(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  decoder = {k: config[k] for k in config if k.startswith('decoder')}
  options = options | {'position_overhang': 0.1}  # made on a CPU
  golden = Golden('mae_itpn_base', _itpn_options(config) | decoder | options, arrays, dtype)

  def loss(model, images):
    out = model(images, noise=arrays['noise'])
    stages = model.stages(images, out.ids_keep)
    everything = model.stages(images)
    pyramids = _order(model.pyramid(*stages)), _order(model.pyramid(*everything))
    return out.loss, (out, stages, everything[2], pyramids)

  grads, (out, stages, tokens, pyramids) = golden.gradients(loss)
  np.testing.assert_array_equal(out.ids_keep, arrays['ids_keep'])
  for key, stage in zip(('stage1', 'stage2'), stages, strict=False):
    golden.check(key, to_rows_and_columns(stage))
  golden.check('tokens', stages[2])
  golden.check('full/tokens', tokens)  # the position embedding as it is
  for prefix, levels in zip(('', 'full/'), pyramids, strict=True):
    for stride, level in zip((16, 8, 4), levels, strict=True):
      golden.check(f'{prefix}pyramid_{stride}', level)
  golden.check('pred', out.pred)
  golden.check('loss', out.loss)
  golden.check_gradients(grads, unused={'decoder_pos_embed'})


@pytest.mark.parametrize('kind', ['detector', 'segmenter'])
def test_itpns_maps(kind):
  config, arrays = load_golden('itpn_pixel.npz')
  own = r'param/(patch_embed|blocks|absolute_pos_embed|align|split|block_|fpn).*'
  params = {k: v for k, v in arrays.items() if re.fullmatch(own, k)}
  options = _itpn_options(config)
  if kind == 'segmenter':
    params['param/absolute_pos_embed'] = arrays['dense/segmenter_absolute_pos_embed']
    options |= {'join_stages': True, 'img_size': 224}
  dense = {k.removeprefix('dense/'): v for k, v in arrays.items() if k.startswith('dense/')}
  golden = Golden('backbone_itpn_base', options, params | dense, 'float64')
  maps = golden.outputs(lambda model, images: model(images))
  for level, x in enumerate(maps):
    golden.check(f'{kind}_stride_{4 << level}', x.transpose(0, 3, 1, 2))


@cases(('saratrx_target', {}))
def test_saratrx(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  keys = ('embed_dim', 'depths', 'num_heads', 'decoder_embed_dim', 'decoder_depth')
  options = {key: config[key] for key in (*keys, 'decoder_num_heads', 'img_size')}
  arrays = {k: v for k, v in arrays.items() if not k.startswith('v2/')}
  golden = Golden('mae_hivit_tiny', options | {'target': 'saratrx'}, arrays, dtype)

  def loss(model, images):
    images = images.repeat(3, axis=3)
    out = model(images, noise=arrays['noise'])
    return out.loss, (out, model.target(images))

  grads, (out, target) = golden.gradients(loss)
  np.testing.assert_array_equal(out.mask, arrays['mask'])
  golden.check('target', target)
  golden.check('pred', out.pred)
  golden.check('loss', out.loss)
  golden.check_gradients(grads, unused={'decoder_pos_embed'})


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_targets_of_saratrx_v2(dtype):
  _, arrays = load_golden('saratrx_target.npz')
  removed = arrays['mask']
  arrays = {k.removeprefix('v2/'): v for k, v in arrays.items() if k.startswith('v2/')}
  images = arrays['image_nchw'].transpose(0, 2, 3, 1).astype(dtype)
  pred = arrays['pred'].astype(dtype)

  def loss(weights, images):
    target = targets.saratrx_v2(images, weights, True)
    error = jnp.square(pred - target).mean(axis=-1)
    return (error * removed).sum() / removed.sum(), target

  with jax.enable_x64(dtype == 'float64'):
    weights = jnp.asarray(arrays['simple_weights'], dtype)
    (value, target), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights, images)
    features = jax.jit(targets.features_v2)(images)
  relative = TOLERANCE[dtype]
  for i, feature in enumerate(features, 1):
    assert_close(feature, arrays[f'feature_{i}'][:, 0], relative=relative, name=f'feature_{i}')
  assert_close(target, arrays['target'], relative=relative)
  assert_close(value, arrays['loss'], relative=relative)
  # Sums of 3072 terms that cancel, in the file's float32: float64 with its features is as far off.
  assert_close(gradient, arrays['grad/simple_weights'], relative=1e-4)


def test_sincos():
  with np.load(GOLDEN / 'sincos_pos_embed.npz') as file:
    for name, value in file.items():
      dim, side = (int(part[1:]) for part in name.split('_'))
      np.testing.assert_allclose(sincos_2d(dim, (side, side))[0], value, rtol=0, atol=1e-7)
