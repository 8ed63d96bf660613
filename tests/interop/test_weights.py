"""Weights in and out: exact, complete, and refused with the reason when they do not fit."""

import functools
import json
import logging
import os

import jax
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, exporter, files, importer, infer
from hivit_jax.interop.files import StateDict
from hivit_jax.models import positions, resize
from tests.helpers import (
  GOLDEN,
  TINY,
  TINY_MAE,
  abstract_model,
  assert_close,
  load_golden,
  random_images,
  random_model,
  torch_gradients,
)
from tests.interop_files import HEADS, golden_state, official, save, tensors

OPTIONS = HEADS | {'decoder_num_heads': 2}
ALL = (
  'hivit_rpe', 'hivit_norpe', 'mae_hifeat_normpix', 'mae_rpe_nohifeat',
  'detection_backbone', 'segmentation_backbone', 'vit_mae', 'swin', 'simmim_swin',
)  # fmt: skip


@pytest.fixture(params=['.pth', '.safetensors'])
def written(request, tmp_path):
  """A function that writes a golden state dict and returns its path."""
  if request.param == '.pth':
    pytest.importorskip('torch')

  def write(name):
    path = tmp_path / f'{name}{request.param}'
    if request.param == '.pth':
      return save(path, official(golden_state(name), 'module.'))
    files.write(path, golden_state(name))
    return path

  return write


@pytest.mark.parametrize('name', ALL)
def test_torch_to_jax_to_torch_is_bit_identical(written, name):
  state = golden_state(name)
  model = hivit_jax.create_model(weights=written(name), **_heads(name))
  out = exporter.state_dict(model, prefix='')
  assert set(out) == set(state)
  unused = {'norm.weight', 'norm.bias'} if name == 'mae_rpe_nohifeat' else set()
  masks = {key for key in state if key.endswith('attn_mask')}  # random in the golden files
  for key in set(out) - unused:
    assert (out[key].shape, out[key].dtype) == (state[key].shape, state[key].dtype), key
    if key in masks:
      assert set(np.unique(out[key])) == {-100, 0}
    else:
      assert out[key].tobytes() == state[key].tobytes(), key
  for key in unused:  # the official code never applies them: written as they start
    np.testing.assert_array_equal(out[key], float(key == 'norm.weight'))


@pytest.mark.parametrize('name', ['hivit_rpe', 'hivit_norpe'])
def test_an_imported_model_gives_the_golden_logits(written, name):
  _, arrays = load_golden(f'{name}.npz')
  model = hivit_jax.create_model(weights=written(name), **HEADS)
  logits = jax.jit(lambda x: model(x))(arrays['image_nchw'].transpose(0, 2, 3, 1))
  assert_close(logits, arrays['logits'])


def _heads(name):
  return OPTIONS if 'mae' in name else HEADS


@pytest.mark.parametrize('step', ['three_stages', 'global', 'mlp_stem'])
def test_the_steps_from_swin_to_hivit_are_told_from_their_weights(step):
  own = {'image_size': 128, 'embed_dim': 16, 'depths': (2, 1, 1), 'window_size': 4}
  model = hivit_jax.create_model(f'swin_base_{step}', **own, num_classes=5)
  state = StateDict(exporter.state_dict(model), 'x', {'image_size': (128, 128)})
  described = carried.model_of(state)
  again = hivit_jax.create_model(described.name, **described.arguments, seed=1)
  report = importer.load_into(again, state)
  assert not report.resized
  image = random_images(1, 128, 128, 3)
  np.testing.assert_array_equal(again(image), model(image))


@functools.cache
def _shapes(model_name):
  """The state dict of a full-size model, of no memory."""
  _, abstract = abstract_model(model_name)
  empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
  return exporter.named_arrays(empty)


@pytest.mark.parametrize(
  ('golden', 'model', 'layout'),
  [
    ('hivit_tiny', 'hivit_tiny', 'official'),
    ('hivit_small', 'hivit_small', 'official'),
    ('hivit_base', 'hivit_base', 'official'),
    ('mae_hivit_base_dec512d6b', 'mae_hivit_base', 'mae'),
    ('mae_vit_base', 'mae_vit_base', 'mae'),
    ('swin_base', 'swin_base', 'official'),
  ],
)
def test_names_and_shapes_are_those_of_the_official_code(golden, model, layout):
  own = GOLDEN / f'state_dict_names_{golden}.json'
  if own.exists():
    expected = json.loads(own.read_text())
  else:
    expected = json.loads((GOLDEN / 'state_dict_names.json').read_text())[golden]
  state = StateDict(_shapes(model), 'x', {'image_size': (224, 224)})
  out = exporter.in_layout(state, layout)
  assert {name: list(value.shape) for name, value in out.items()} == expected


@pytest.mark.parametrize(
  'name',
  [
    'hivit_tiny', 'hivit_small', 'hivit_base', 'mae_hivit_base', 'vit_base', 'mae_vit_base',
    'swin_tiny', 'swin_base', 'simmim_swin_tiny',
  ],
)  # fmt: skip
def test_the_model_is_told_from_its_shapes(name):
  described = infer.describe(_shapes(name), 'x')
  assert described.name == name
  ours, theirs = models.variant(name), described.arguments
  assert {key: theirs[key] for key in ours} == ours
  size = 192 if 'simmim' in name else 224
  assert theirs['image_size'] == (size, size)
  assert theirs.get('window_size') == (size // 32 if 'swin' in name else None)


def test_backbone_layout_holds_the_encoder_only_under_its_prefix():
  state = golden_state('mae_hifeat_normpix')
  out = exporter.in_layout(StateDict(state, 'x', {}), 'backbone')
  encoder = {k for k in state if k.startswith(('patch_embed.', 'blocks.', 'absolute_pos_embed'))}
  assert set(out) == {f'backbone.{name}' for name in encoder}
  vit = exporter.in_layout(StateDict(golden_state('vit_mae'), 'x', {}), 'backbone')
  assert {'backbone.cls_token', 'backbone.pos_embed', 'backbone.norm.weight'} < set(vit)
  assert not any('decoder' in name or 'mask_token' in name for name in vit)


def test_mmpretrain_names_out_and_in():
  model = models.create_model('hivit_tiny', **TINY, num_classes=7)
  out = exporter.state_dict(model, 'mmpretrain')
  assert {'backbone.pos_embed', 'head.fc.weight', 'backbone.blocks.7.mlp.fc1.bias'} < set(out)
  assert 'backbone.blocks.6.attn.relative_position_index' in out
  assert not any('absolute' in name or 'fc_norm' in name for name in out)
  arrays = files.normal_names(out)
  again = models.create_model('hivit_tiny', **TINY, num_classes=7, seed=1)
  with pytest.raises(UserError, match=r'missing: fc_norm\.'):
    _load(again, arrays)
  report = _load(again, arrays, partial=True)
  assert report.new == ['fc_norm.bias', 'fc_norm.weight']
  np.testing.assert_array_equal(again.head.kernel[...], model.head.kernel[...])
  np.testing.assert_array_equal(again.absolute_pos_embed[...], model.absolute_pos_embed[...])


def _load(model, arrays, metadata=None, **options):
  return importer.load_into(model, StateDict(arrays, 'FILE', metadata or {}), **options)


def test_itpn_with_odd_stem_and_feature_pyramid_is_imported():
  options = TINY | {'depths': (2, 2, 3), 'stem_blocks': (3, 3), 'rpe': False}
  model = models.create_model('backbone_hivit_tiny', **options)
  arrays = exporter.state_dict(model, prefix='')
  pyramid = {
    'align_dim_16tofpn.weight': (8, 32), 'fpn_modules.0.norm2.weight': (8,),
    'split_16to8.reduction.weight': (8, 8), 'block_8to4.1.mlp.fc1.bias': (8,),
  }  # fmt: skip
  arrays |= {name: np.zeros(shape, np.float32) for name, shape in pyramid.items()}
  described = infer.describe(arrays, 'x', num_heads=4)
  assert described.arguments['stem_blocks'] == (3, 3)
  assert described.arguments['depths'][2] == 3
  again = models.create_model(described.name, seed=1, **described.arguments)
  report = _load(again, arrays)
  assert set(report.ignored) == set(pyramid)
  images = random_images(1, 64, 64, 3)
  np.testing.assert_array_equal(again.forward_features(images), model.forward_features(images))
  assert [level.shape[1] for level in again(images)] == [16, 8, 4, 2]


def test_a_pretrained_encoder_goes_into_a_classifier_and_the_report_is_exact(caplog):
  pretrained = golden_state('mae_hifeat_normpix')
  model = models.create_model('hivit_tiny', **TINY, num_classes=5, seed=3)
  head = np.asarray(model.head.kernel[...])
  with pytest.raises(UserError, match=r'MAE checkpoint .* partial=True'):
    _load(model, pretrained)
  with caplog.at_level(logging.INFO):
    report = _load(model, pretrained, partial=True)
  decoder = {k for k in pretrained if k.startswith(('decoder', 'mask_token', 'norm.'))}
  tables = {f'blocks.{i}.attn.relative_position_bias_table' for i in (6, 7)}
  assert set(report.dropped) == decoder
  assert set(report.new) == {'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'} | tables
  assert set(report.zeroed) == tables
  assert set(report.loaded) == set(pretrained) - decoder
  for name in (*report.dropped, *report.new):
    assert name in caplog.text
  np.testing.assert_array_equal(model.head.kernel[...], head)
  # With zero tables the encoder computes what the pretrained one did.
  mae = models.create_model('mae_hivit_tiny', **TINY_MAE)
  _load(mae, pretrained)
  images = random_images(2, 64, 64, 3)
  assert_close(model.forward_features(images), mae.forward_features(images), relative=1e-6)


def test_a_head_of_other_classes_starts_anew_only_in_a_partial_load():
  state = golden_state('hivit_rpe')
  model = models.create_model('hivit_tiny', **TINY, num_classes=5)
  with pytest.raises(UserError, match=r'head\.weight is \(7, 32\) there, \(5, 32\) here'):
    _load(model, state)
  report = _load(model, state, partial=True)
  assert set(report.new) == set(report.dropped) == {'head.weight', 'head.bias'}


def _without(state, *prefixes):
  return {name: value for name, value in state.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize('partial', [False, True])
@pytest.mark.parametrize(
  ('state', 'options', 'message'),
  [
    (lambda s: _without(s, 'blocks.7.mlp.fc1'), {}, r'missing: blocks\.7\.mlp\.fc1\.bias'),
    (lambda s: s | {'blocks.0.gamma': np.ones(3, np.float32)}, {}, r'unused: blocks\.0\.gamma'),
    (
      lambda s: s,
      {'depths': (1, 1, 1)},
      r'depths=\(1, 1, 2\), not \(1, 1, 1\).*depths=1,1,2',
    ),
    (lambda s: s, {'depths': (1, 1, 3)}, r'depths=\(1, 1, 2\), not \(1, 1, 3\)'),
    (lambda s: s, {'embed_dim': 64}, 'embed_dim=32, not 64: .*--config.model.embed_dim=32'),
    (lambda s: _without(s, 'patch_embed'), {}, r'differs: HiViT \(no patch_embed'),
  ],
)
def test_what_does_not_fit_is_refused_with_names_and_cause(state, options, message, partial):
  model = models.create_model('hivit_tiny', **(TINY | options), num_classes=7)
  before = torch_gradients(nnx.to_pure_dict(nnx.state(model)))
  with pytest.raises(UserError, match=message) as error:
    _load(model, state(golden_state('hivit_rpe')), partial=partial)
  assert '\n' not in str(error.value)
  after = torch_gradients(nnx.to_pure_dict(nnx.state(model)))
  assert all((before[name] == after[name]).all() for name in before)  # nothing half loaded


def test_extra_names_outside_the_encoder_are_refused_unless_partial():
  state = golden_state('hivit_rpe') | {'neck.conv.weight': np.ones(3, np.float32)}
  model = models.create_model('hivit_tiny', **TINY, num_classes=7)
  with pytest.raises(UserError, match=r'unused: neck\.conv\.weight'):
    _load(model, state)
  assert _load(model, state, partial=True).dropped == ['neck.conv.weight']


def test_other_tables_than_the_model_has_are_explained():
  model = models.create_model('hivit_tiny', **TINY, num_classes=7, rpe=False)
  with pytest.raises(UserError, match='rpe=True'):
    _load(model, golden_state('hivit_rpe'))


@pytest.mark.parametrize('size', [(96, 96), (64, 96), (32, 48)])
def test_another_image_size_resizes_positions_and_says_so(caplog, size):
  state = golden_state('hivit_rpe')
  grid = size[0] // 16, size[1] // 16
  model = models.create_model('hivit_tiny', **(TINY | {'image_size': size}), num_classes=7)
  with caplog.at_level(logging.INFO):
    report = _load(model, state)
  assert set(report.resized) == {k for k in state if 'pos_embed' in k or 'bias_table' in k}
  assert f'from 4x4 to {grid[0]}x{grid[1]} units' in caplog.text
  expected = resize.position_embedding(state['absolute_pos_embed'], (4, 4), grid)
  np.testing.assert_array_equal(model.absolute_pos_embed[...], expected)
  assert np.isfinite(model(random_images(1, *size, 3))).all()


@pytest.mark.parametrize('sides', ['14to10', '14to16'])
def test_position_parameters_at_another_size_are_those_of_the_official_code(sides):
  """Classifiers resize bias tables as pictures, dense models over a geometric sequence (BEiT)."""
  with np.load(GOLDEN / 'table_resize_bicubic.npz') as file:
    golden = {key.split('/')[1]: file[key] for key in file if key.startswith(f'{sides}/')}
  source, target = (int(side) for side in sides.split('to'))
  options = {'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2, 'rpe': True}
  trained = models.create_model('hivit_tiny', **options, image_size=16 * source)
  table = 'blocks.6.attn.relative_position_bias_table'
  state = exporter.state_dict(trained)
  state |= {table: golden['table_in'], 'absolute_pos_embed': golden['pos_in']}

  model = models.create_model('hivit_tiny', **options, image_size=16 * target)
  report = _load(model, state)
  assert report.resized[table] == f'from {source}x{source} to {target}x{target} units, bicubic'
  ours = model.blocks[6].attn.relative_position_bias_table[...]
  assert_close(ours, golden['table_out'], relative=2e-6)
  assert_close(model.absolute_pos_embed[...], golden['pos_out'], relative=2e-6)

  dense = models.create_model('backbone_hivit_tiny', **options, image_size=16 * target)
  _load(dense, state, partial=True)
  expected = resize.bias_table(golden['table_in'], (source,) * 2, (target,) * 2)
  ours = dense.blocks[6].attn.relative_position_bias_table[...]
  np.testing.assert_array_equal(ours, expected)


def test_the_decoders_fixed_positions_are_computed_again():
  options = TINY_MAE | {'image_size': (96, 48)}
  model = models.create_model('mae_hivit_tiny', **options)
  _load(model, golden_state('mae_hifeat_normpix'))
  np.testing.assert_array_equal(model.decoder_pos_embed[...], positions.sincos_2d(16, (6, 3)))


def test_weights_of_images_that_are_not_square_need_their_size_once(tmp_path):
  wide = models.create_model('hivit_tiny', **(TINY | {'image_size': (32, 96)}))
  state = exporter.state_dict(wide)
  square = models.create_model('hivit_tiny', **TINY)
  with pytest.raises(UserError, match=r'12 units.*image_size'):
    _load(square, state)
  _load(square, state, image_size=(32, 96))
  expected = resize.position_embedding(state['absolute_pos_embed'], (2, 6), (4, 4))
  np.testing.assert_array_equal(square.absolute_pos_embed[...], expected)
  path = tmp_path / 'wide.safetensors'  # which can carry it
  files.write(path, state, metadata={'image_size': [32, 96]})
  again = hivit_jax.create_model(weights=path, num_heads=4)
  assert again.grid == (2, 6)
  np.testing.assert_array_equal(again.absolute_pos_embed[...], wide.absolute_pos_embed[...])


@pytest.mark.parametrize('size', [(96, 96), (64, 96)])
def test_vits_positions_are_resized_beside_the_class_token(caplog, size):
  state = golden_state('vit_mae')
  grid = size[0] // 16, size[1] // 16
  options = {'embed_dim': 32, 'depth': 2, 'num_heads': 4, 'image_size': size}
  model = nnx.merge(*random_model('vit_base', num_classes=5, **options))
  with caplog.at_level(logging.INFO):
    report = _load(model, state, partial=True)
  assert report.resized == {'pos_embed': f'from 4x4 to {grid[0]}x{grid[1]} units, bicubic'}
  assert 'resized pos_embed from 4x4' in caplog.text
  expected = resize.position_embedding(state['pos_embed'][:, 1:], (4, 4), grid)
  np.testing.assert_array_equal(model.pos_embed[:, 1:], expected)
  np.testing.assert_array_equal(model.pos_embed[:, :1], state['pos_embed'][:, :1])
  assert set(report.new) == {'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'}
  decoder = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}
  again = nnx.merge(*random_model('mae_vit_base', **options, **decoder))
  _load(again, state)
  fixed = positions.sincos_2d(16, grid)
  np.testing.assert_array_equal(again.decoder_pos_embed[:, 1:], fixed)
  assert not again.decoder_pos_embed[:, 0].any()


SWIN = {'embed_dim': 8, 'depths': (2, 1, 1, 1), 'num_heads': (1, 2, 2, 2)}


def _swin(name, **options):
  return nnx.merge(*random_model(name, **SWIN, **options))


def test_simmims_encoder_goes_into_a_swin_of_other_windows(caplog):
  """As SimMIM's code does: tables over a geometric sequence, mask token and decoder dropped."""
  pretrained = _swin('simmim_swin_tiny', image_size=192, window_size=6)
  state = files.normal_names(exporter.state_dict(pretrained))
  assert infer.describe(state, 'x').arguments['window_size'] == 6
  model = _swin('swin_tiny', num_classes=5)
  with pytest.raises(
    UserError, match=r'SimMIM checkpoint .*load it into simmim_swin_tiny, or load'
  ):
    _load(model, state)
  with caplog.at_level(logging.INFO):
    report = _load(model, state, partial=True)
  assert 'resized relative_position_bias_table from 6x6 to 7x7 patches, cubic over' in caplog.text
  assert set(report.dropped) == {'mask_token', 'decoder.0.weight', 'decoder.0.bias'}
  assert set(report.new) == {'head.weight', 'head.bias'}
  for ours, theirs in zip(model.layers, pretrained.encoder.layers, strict=True):
    table = theirs.blocks[0].attn.relative_position_bias_table[...]
    expected = resize.bias_table(np.asarray(table), (6, 6), (7, 7))
    np.testing.assert_array_equal(ours.blocks[0].attn.relative_position_bias_table, expected)
  np.testing.assert_array_equal(model.norm.scale[...], pretrained.encoder.norm.scale[...])


def test_a_swin_classifier_goes_to_other_windows_as_in_its_own_code():
  torch = pytest.importorskip('torch')
  trained = _swin('swin_tiny', num_classes=5)
  state = exporter.state_dict(trained)
  model = _swin('swin_tiny', num_classes=5, image_size=(384, 384), window_size=12)
  report = _load(model, state)
  assert set(report.resized.values()) == {'from 7x7 to 12x12 patches, bicubic'}
  name = 'layers.2.blocks.0.attn.relative_position_bias_table'
  table = torch.from_numpy(state[name].T.reshape(1, -1, 13, 13).copy())
  expected = torch.nn.functional.interpolate(table, size=(23, 23), mode='bicubic')
  ours = model.layers[2].blocks[0].attn.relative_position_bias_table
  assert_close(ours, expected.numpy().reshape(-1, 23 * 23).T, relative=2e-6)


@pytest.mark.parametrize(
  ('size', 'window', 'masked', 'wide'),
  [((224, 224), 7, False, False), ((256, 256), 4, True, False), ((128, 256), 4, True, True)],
)
def test_swins_image_size_is_told_by_its_masks_or_its_last_window(size, window, masked, wide):
  """Where the last map is a window, tables suffice; images that are not square have to be given."""
  state = exporter.state_dict(_swin('swin_tiny', image_size=size, window_size=window))
  if not masked:
    state = {name: value for name, value in state.items() if 'attn_mask' not in name}
  if wide:
    with pytest.raises(UserError, match=r'128 windows.*not a square: give its image_size'):
      infer.describe(state, 'x')
  known = {'image_size': size} if wide else {}
  arguments = infer.describe(state, 'x', **known).arguments
  assert (arguments['image_size'], arguments['window_size']) == (size, window)
  assert {key: arguments[key] for key in SWIN} == SWIN


@pytest.mark.parametrize(
  ('source', 'target', 'message'),
  [
    ('vit_mae', 'swin_tiny', 'This is mae_vit_base, a different kind of model'),
    ('swin', 'hivit_tiny', 'This is swin_tiny, a different kind'),
  ],
)
def test_models_of_another_kind_are_named(source, target, message):
  with pytest.raises(UserError, match=message):
    _load(nnx.merge(*abstract_model(target)), golden_state(source), partial=True)


def test_a_model_that_is_not_here_is_named():
  state = golden_state('swin')
  state |= {f'decoder_{name}.weight': np.zeros((4, 4), np.float32) for name in ('embed', 'pred')}
  with pytest.raises(UserError, match='x is a mae_swin, and there is no such model here'):
    infer.describe(state, 'x')


def test_an_encoder_without_head_and_other_patches():
  """As MAE publishes them: without decoder; ViT-H has patches of 14 pixels."""
  state = _without(golden_state('vit_mae'), 'decoder', 'mask_token')
  described = infer.describe(state, 'x', num_heads=4)
  assert (described.name, described.arguments['depth']) == ('vit_base', 2)
  classifier = nnx.merge(*random_model(described.name, **described.arguments))
  report = _load(classifier, state)
  assert set(report.dropped) == {'norm.weight', 'norm.bias'}
  assert set(report.new) == {'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'}
  state['patch_embed.proj.weight'] = np.zeros((32, 3, 14, 14), np.float32)
  with pytest.raises(UserError, match=r'differs: ViT \(patches of 14x14 pixels, not 16x16\); '):
    infer.describe(state, 'x')


def test_loaded_weights_do_not_share_the_files_memory(tmp_path):
  pytest.importorskip('torch')
  path = save(tmp_path / 'x.pth', tensors(golden_state('hivit_norpe')))
  model = hivit_jax.create_model(weights=path, **HEADS)
  path.write_bytes(bytes(path.stat().st_size))
  expected = golden_state('hivit_norpe')['head.bias']
  np.testing.assert_array_equal(model.head.bias[...], expected)


def test_numbers_that_are_none_are_warned_of_once(caplog):
  state = golden_state('hivit_rpe')
  state['head.bias'] = np.full_like(state['head.bias'], np.nan)
  model = models.create_model('hivit_tiny', **TINY, num_classes=7)
  _load(model, state)
  (record,) = [r for r in caplog.records if r.levelname == 'WARNING']
  message = (
    'FILE: 1 parameters hold NaN or infinite numbers, and so will the model; the first is head.bias'
  )
  assert record.getMessage().startswith(message)


@pytest.mark.parametrize('umask', [0o022, 0o077])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_files_are_readable_as_the_umask_says(tmp_path, suffix, umask):
  if suffix == '.pth':
    pytest.importorskip('torch')
  before = os.umask(umask)
  try:
    files.write(tmp_path / f'x{suffix}', {'a': np.ones(2, np.float32)})
  finally:
    os.umask(before)
  assert (tmp_path / f'x{suffix}').stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize('path', [{}, 3, ''])
def test_a_path_is_expected(path):
  with pytest.raises(UserError, match=r"weights=({}|3|''): expected the path of a \.pth"):
    hivit_jax.create_model(weights=path)


def test_no_half_written_file_is_left(tmp_path):
  with pytest.raises(UserError, match='must end in'):
    files.write(tmp_path / 'x.bin.txt', {})
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    files.write(tmp_path / 'file' / 'x.safetensors', {'a': np.ones(2, np.float32)})
  assert [path.name for path in tmp_path.iterdir()] == ['file']


# Linear probes: a BatchNorm before the last layer


def _probe() -> nnx.Module:
  """A linear probe with statistics as of a training."""
  graphdef, params = random_model('hivit_tiny', **TINY, num_classes=5, head_batch_norm=True)
  params['head_norm'] = {
    'mean': np.linspace(-1, 1, 32, dtype=np.float32),
    'var': np.linspace(0.1, 3, 32, dtype=np.float32),
  }
  return nnx.merge(graphdef, params)


def test_a_linear_probe_of_pytorch_is_read(tmp_path):
  """With the names that `Sequential(BatchNorm1d, Linear)` gives the head."""
  model = _probe()
  state = {
    name.replace('head_norm.', 'head.0.').replace('head.weight', 'head.1.weight').replace(
      'head.bias', 'head.1.bias'
    ): value
    for name, value in exporter.named_arrays(nnx.to_pure_dict(nnx.state(model))).items()
  }  # fmt: skip
  state['head.0.num_batches_tracked'] = np.asarray(7)
  files.write(tmp_path / 'probe.safetensors', state)
  loaded = hivit_jax.create_model(weights=tmp_path / 'probe.safetensors', num_heads=4)
  images = random_images(2, 64, 64, 3)
  np.testing.assert_array_equal(loaded(images), model(images))


def test_a_linear_probe_becomes_a_plain_classifier_for_pytorch(tmp_path):
  model = _probe()
  out = exporter.state_dict(model, 'official')
  assert not any('norm.running' in name or name.startswith('head_norm') for name in out)
  files.write(tmp_path / 'plain.safetensors', out)
  plain = hivit_jax.create_model(weights=tmp_path / 'plain.safetensors', num_heads=4)
  assert plain.head_norm is None
  images = random_images(2, 64, 64, 3)
  assert_close(plain(images), model(images))
