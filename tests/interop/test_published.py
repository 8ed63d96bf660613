"""Files of exactly the layouts that are published: what they are, where they load, what is said."""

import functools
import json
import logging
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, exporter, files, importer, layer_scale, torch_names
from hivit_jax.interop.files import StateDict
from hivit_jax.interop.report import LoadReport
from hivit_jax.models import resize
from hivit_jax.models.hivit import HiViT
from hivit_jax.models.units import join_units, to_rows_and_columns
from hivit_jax.tasks import reconstruction
from tests.helpers import (
  GOLDEN,
  TINY,
  TINY_MAE,
  abstract_model,
  assert_close,
  load_golden,
  random_images,
  random_model,
)
from tests.interop_files import HEADS, golden_state, save, tensors

HEAD = {'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'}


@functools.cache
def layouts() -> dict:
  return json.loads((GOLDEN / 'family_state_dict_names.json').read_text())


def published(start: str) -> StateDict:
  """A full-size state dict of no memory, by the beginning of its description."""
  (shapes,) = (shapes for name, shapes in layouts().items() if name.startswith(start))
  arrays = {k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes.items()}
  return StateDict(files.normal_names(arrays), 'FILE', {})


def fitted(state: StateDict, name: str, **options) -> LoadReport:
  """The report of a load into a full-size model, of which nothing is computed."""
  return importer.fit(nnx.merge(*abstract_model(name, **options)), state)[1]


def tables(report) -> set[str]:
  return {name for name in report.new if name.endswith('relative_position_bias_table')}


# The official encoder: 299 tensors, a mask token and a norm, without decoder


def test_the_official_encoder_is_told_and_loads_everywhere_without_a_flag():
  state = published('official')
  assert len(state.arrays) == 302
  described = carried.model_of(state)
  assert described.name == 'backbone_hivit_base'
  leftovers = {'mask_token', 'norm.weight', 'norm.bias'}
  backbone = fitted(state, described.name, **described.arguments)
  assert set(backbone.dropped) == leftovers
  assert (len(backbone.loaded), backbone.new) == (299, [])
  classifier = fitted(state, 'hivit_base')
  assert set(classifier.dropped) == leftovers
  assert set(classifier.new) == HEAD | tables(classifier)
  assert len(tables(classifier)) == len(classifier.zeroed) == 20
  autoencoder = fitted(state, 'mae_hivit_base')
  assert (len(autoencoder.loaded), autoencoder.dropped) == (302, [])
  assert {name.split('.')[0] for name in autoencoder.new} == {
    'decoder_embed', 'decoder_blocks', 'decoder_norm', 'decoder_pred', 'decoder_pos_embed'
  }  # fmt: skip


@pytest.fixture
def encoder():
  """The official file's names, tiny."""
  state = golden_state('mae_hifeat_normpix')
  return {name: value for name, value in state.items() if not name.startswith('decoder')}


@pytest.fixture(params=['bare', 'model', 'module.', 'float16', '.safetensors'])
def encoder_file(request, tmp_path, encoder):
  """It in the containers that people make of it."""
  if request.param == '.safetensors':
    files.write(tmp_path / 'x.safetensors', encoder)
    return tmp_path / 'x.safetensors'
  torch = pytest.importorskip('torch')
  content = tensors(encoder, 'module.' if request.param == 'module.' else '')
  if request.param == 'float16':
    content = {name: value.to(torch.float16) for name, value in content.items()}
  return save(tmp_path / 'x.pth', {'model': content} if request.param == 'model' else content)


def test_an_encoder_alone_in_every_container(encoder, encoder_file, caplog):
  relative = 1e-2 if encoder['mask_token'].tobytes() not in encoder_file.read_bytes() else 0
  mae = hivit_jax.create_model('mae_hivit_tiny', **TINY_MAE, weights=encoder_file)
  options = {'num_classes': 3, 'seed': 5}
  with caplog.at_level(logging.INFO):
    classifier = hivit_jax.create_model('hivit_tiny', **TINY, **options, weights=encoder_file)
  for name in ('dropped, no place in this model: mask_token', 'norm.weight', *HEAD):
    assert name in caplog.text
  backbone = hivit_jax.create_model(weights=encoder_file, **HEADS)
  images = random_images(2, 64, 64, 3)
  features = [m.forward_features(images) for m in (mae, classifier, backbone)]
  assert_close(features[1], features[0], relative=1e-6)
  assert_close(features[2], features[0], relative=1e-6)
  for model in (mae, classifier, backbone):
    ours = np.asarray(model.blocks[0].mlp.fc1.kernel[...]).T
    assert_close(ours, encoder['blocks.0.mlp.fc1.weight'], relative=relative)
  fresh = hivit_jax.create_model('hivit_tiny', **TINY, **options)
  np.testing.assert_array_equal(classifier.head.kernel[...], fresh.head.kernel[...])
  assert_close(mae.mask_token[...], encoder['mask_token'], relative=relative)
  assert np.isfinite(mae(images, rng=jax.random.key(0)).loss)


def test_with_a_number_of_classes_an_encoder_alone_is_a_classifier(encoder, tmp_path):
  files.write(tmp_path / 'x.safetensors', encoder)
  options = HEADS | {'image_size': (64, 96)}
  model = hivit_jax.create_model(weights=tmp_path / 'x.safetensors', num_classes=5, **options)
  assert isinstance(model, HiViT)
  assert jax.jit(lambda x: model(x))(random_images(1, 64, 96, 3)).shape == (1, 5)


@pytest.mark.parametrize(('name', 'own'), [('hivit_tiny', {'rpe': False}), ('fast_itpn_tiny', {})])
def test_widths_and_ratios_that_nobody_publishes_are_told(name, own):
  options = TINY | own | {'embed_dim': 36, 'num_heads': 3, 'stem_mlp_ratio': 17 / 9}
  options |= {'mlp_ratio': 97 / 36, 'num_classes': 2, 'image_size': (32, 32)}
  model = nnx.merge(*random_model(name, **options))
  state = StateDict(files.normal_names(exporter.state_dict(model)), 'FILE', {})
  described = carried.model_of(state, num_heads=3)
  again = hivit_jax.create_model(described.name, **described.arguments)
  assert importer.load_into(again, state).new == []
  images = random_images(1, 32, 32, 3)
  # Fast-iTPN's bias of the keys, which files do not have, changes nothing but the rounding.
  assert_close(again(images), model(images), relative=2e-6)


def test_a_mask_token_of_another_decoder_is_left_out_and_said(encoder):
  model = hivit_jax.create_model('mae_hivit_tiny', **TINY_MAE | {'decoder_embed_dim': 32})
  report = importer.load_into(model, StateDict(encoder, 'FILE', {}))
  assert report.dropped == ['mask_token']
  assert 'mask_token' in report.new


def test_what_an_encoder_alone_must_not_lack_or_have(encoder):
  model = hivit_jax.create_model('hivit_tiny', **TINY, num_classes=3)
  without = {k: v for k, v in encoder.items() if k != 'blocks.1.mlp.fc1.bias'}
  with pytest.raises(UserError, match=r'missing: blocks\.1\.mlp\.fc1\.bias'):
    importer.load_into(model, StateDict(without, 'FILE', {}))
  more = encoder | {'neck.weight': np.ones(3, np.float32)}
  with pytest.raises(UserError, match=r'unused: neck\.weight'):
    importer.load_into(model, StateDict(more, 'FILE', {}))


def test_it_converts_to_its_encoder_and_there_is_nothing_to_classify_with(forks, tmp_path):
  path = tmp_path / 'x.safetensors'
  wide = nnx.merge(*random_model('mae_hivit_tiny', **TINY_MAE | {'embed_dim': 64, 'num_heads': 1}))
  state = exporter.state_dict(wide)
  files.write(path, {k: v for k, v in state.items() if not k.startswith('decoder')})
  done = forks('hivit_jax/tools/convert.py', 'from-torch', str(path), f'--out={tmp_path / "dir"}')
  assert done.status == 0
  assert 'dropped, no place in this model: mask_token, norm.' in done.stdout
  for weights in (path, tmp_path / 'dir'):
    option = '--weights' if weights is path else '--workdir'
    done = forks('hivit_jax/tools/predict.py', f'{option}={weights}', 'image.png')
    assert done.status == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert 'is backbone_hivit_tiny, which has no classifier. Finetune it first' in line
  files.write(path, exporter.state_dict(hivit_jax.create_model('backbone_hivit_tiny'), prefix=''))
  out = f'--out={tmp_path / "y"}'
  done = forks('hivit_jax/tools/convert.py', 'from-torch', str(path), out, '--model=hivit_tiny')
  assert done.status == 2
  assert 'head.weight' in done.stderr
  assert f'--config.init={path}' in done.stderr


# Fast-iTPN


def _numbers(arrays) -> int:
  return sum(value.size for value in arrays.values())


@pytest.mark.parametrize(
  ('size', 'pixels', 'depths'),
  [
    ('tiny', 224, (1, 1, 12)),
    ('small', 224, (2, 2, 20)),
    ('base', 224, (3, 3, 24)),
    ('large', 256, (2, 2, 40)),
  ],
)
def test_fast_itpn_is_told_from_its_files_and_every_number_counts(size, pixels, depths):
  state = published(f'Fast-iTPN {size}, finetuned')
  described = carried.model_of(state)
  assert described.name == f'fast_itpn_{size}'
  assert described.arguments['depths'] == depths
  assert described.arguments['image_size'] == (pixels, pixels)
  report = fitted(state, described.name, **described.arguments)
  assert [report.new, report.dropped, report.ignored] == [[], [], {}]
  (shapes,) = (v for k, v in layouts().items() if k.startswith(f'Fast-iTPN {size}, finetuned'))
  keys = sum(value.size // 3 for k, value in state.arrays.items() if k.endswith('qkv.bias'))
  assert _numbers(state.arrays) - keys == sum(math.prod(shape) for shape in shapes.values())
  back = exporter.in_layout(state)
  assert {name: list(value.shape) for name, value in back.items()} == shapes
  (pretrained,) = (
    k for k in layouts() if k.startswith('Fast-iTPN pretrained') and f'float16; {size}:' in k
  )
  state = published(pretrained)
  described = carried.model_of(state)
  assert described.name == f'backbone_fast_itpn_{size}'
  report = fitted(state, f'fast_itpn_{size}')
  assert set(report.new) == HEAD
  assert {name.split('.')[0] for name in report.dropped} == {
    'mask_token', 'norm', 'lm_head', 'decoder_embed'
  }  # fmt: skip
  assert {name.split('.')[0] for name in report.ignored} == {
    'align_dim_16tofpn', 'align_dim_16to8', 'align_dim_8to4', 'fpn_modules', 'split_16to8',
    'split_8to4', 'block_16to8', 'block_8to4',
  }  # fmt: skip


def _fast_itpn(pretrained: bool = False) -> dict[str, np.ndarray]:
  """The tiny golden model as its code has it: a classifier, or what a pretraining leaves."""
  _, arrays = load_golden('fast_itpn.npz')
  state = golden_state('fast_itpn')
  if not pretrained:
    return state
  own = {name: value for name, value in state.items() if name not in HEAD}
  start = 'pretrain/param/'
  return own | {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_fast_itpn_there_and_back_to_the_bit(tmp_path, suffix):
  state = _fast_itpn()
  path = tmp_path / f'x{suffix}'
  if suffix == '.pth':
    pytest.importorskip('torch')
    save(path, {'module': tensors(state)})
  else:
    files.write(path, state)
  model = hivit_jax.create_model(weights=path, **HEADS)
  _, arrays = load_golden('fast_itpn.npz')
  logits = jax.jit(lambda x: model(x))(arrays['image_nchw'].transpose(0, 2, 3, 1))
  assert_close(logits, arrays['logits'])
  out = exporter.state_dict(model)
  assert {k: (v.shape, v.tobytes()) for k, v in out.items()} == {
    k: (v.shape, v.tobytes()) for k, v in state.items()
  }
  backbone = exporter.state_dict(model, 'backbone')
  assert set(backbone) == {f'backbone.{name}' for name in set(state) - HEAD}


def test_a_pretrained_fast_itpn_as_deepspeed_leaves_it(tmp_path, caplog):
  torch = pytest.importorskip('torch')
  state = _fast_itpn(pretrained=True)
  content = {
    'module': {name: value.half() for name, value in tensors(state).items()},
    'buffer_names': [], 'optimizer': None, 'lr_scheduler': None, 'skipped_steps': 0,
    'param_shapes': [{'pos_embed': torch.Size((1, 16, 32))}], 'dp_world_size': 8,
    'ds_config': {'fp16': {'enabled': True}}, 'ds_version': '0.4.0', 'epoch': 1599,
  }  # fmt: skip
  path = save(tmp_path / 'x.pt', content)
  with caplog.at_level(logging.INFO):
    options = {'num_heads': 4, 'embed_dim': 32, 'depths': (1, 2, 2), 'image_size': 64}
    classifier = hivit_jax.create_model('fast_itpn_tiny', **options, num_classes=3, weights=path)
  assert 'dropped, no place in this model: mask_token' in caplog.text
  assert "left out, the feature pyramid of iTPN's pretraining: align_dim" in caplog.text
  backbone = hivit_jax.create_model(weights=path, **HEADS)
  half = state['blocks.5.attn.k_proj.weight'].astype(np.float16).astype(np.float32)
  for model in (classifier, backbone):
    keys = np.split(np.asarray(model.blocks[5].attn.qkv.kernel[...]), 3, axis=1)[1]
    np.testing.assert_array_equal(keys.T, half)
  out = exporter.state_dict(backbone, prefix='')
  encoder = set(_fast_itpn()) - HEAD
  assert set(out) == encoder
  for name in encoder:
    expected = state[name].astype(np.float16).astype(np.float32)
    assert out[name].tobytes() == expected.tobytes(), name


def test_fast_itpns_units_meet_only_in_the_main_stage():
  """So that those that are not kept need not be computed; the stem sees no other unit."""
  model = nnx.merge(*random_model('backbone_fast_itpn_tiny', **TINY))
  images, ids = random_images(2, 64, 64, 3), np.array([[3, 8], [15, 0]])
  some, everything = jax.jit(lambda x: (model.stages(x, ids), model.stages(x)))(images)
  for kept, whole in zip(some[:2], everything[:2], strict=True):
    assert_close(kept, np.asarray(whole)[np.arange(2)[:, None], ids], relative=2e-6)
  levels = jax.jit(lambda x: model(x))(images)
  assert [level.shape[1:] for level in levels] == [(16, 16, 8), (8, 8, 16), (4, 4, 32), (2, 2, 32)]
  for level, stage in zip(levels, everything, strict=False):
    cells = stage.reshape(2, 16, -1, stage.shape[-1])
    assert_close(level, join_units(to_rows_and_columns(cells), (4, 4)), relative=2e-6)


# iTPN-CLIP: a HiViT whose residual branches have scales


@pytest.mark.parametrize(('size', 'stem'), [('base', (3, 3)), ('large 224', None)])
def test_itpn_clip_is_told_from_its_files(size, stem):
  state = published(f'iTPN-CLIP {size}, finetuned')
  described = carried.model_of(state)
  assert described.name == f'hivit_{size.split()[0]}'
  assert described.arguments.get('stem_blocks') == stem
  assert described.arguments['layer_scale'] == 0.1
  report = fitted(state, described.name, **described.arguments)
  assert [report.new, report.dropped] == [[], []]
  assert len(report.loaded) == len(state.arrays) - 1
  assert list(report.ignored) == ['relative_position_index']
  back = exporter.in_layout(state)
  assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.arrays.items()}
  state = published(f'iTPN-CLIP {size}, pretrained')
  described = carried.model_of(state)
  assert described.name == f'backbone_hivit_{size.split()[0]}'
  own = {key: described.arguments[key] for key in ('depths', 'layer_scale')}
  report = fitted(state, f'hivit_{size.split()[0]}', **own, stem_blocks=stem)
  assert set(report.new) == HEAD
  assert {name.split('.')[0] for name in report.dropped} == {
    'mask_token', 'norm', 'norm_cls', 'lm_head', 'lm_cls_head', 'decoder_embed', 'cls_pt_layers'
  }  # fmt: skip


@pytest.fixture
def itpn_clip(tmp_path):
  """The tiny golden classifier in a file, its state dict, images and logits."""
  _, arrays = load_golden('itpn_clip.npz')
  own = {k.removeprefix('classifier/'): v for k, v in arrays.items() if 'grad' not in k}
  names = r'param/(patch_embed|blocks|absolute_pos_embed|relative|fc_norm|head).*'
  state = {k.removeprefix('param/'): v for k, v in own.items() if re.fullmatch(names, k)}
  path = tmp_path / 'x.safetensors'
  files.write(path, state)
  return path, state, own['image_nchw'].transpose(0, 2, 3, 1), own['logits']


def test_itpn_clip_there_and_back_with_its_scales(itpn_clip):
  path, state, images, logits = itpn_clip
  model = hivit_jax.create_model(weights=path)
  assert_close(jax.jit(lambda x: model(x))(images), logits)
  out = exporter.state_dict(model)
  assert {k: v.tobytes() for k, v in out.items()} == {k: v.tobytes() for k, v in state.items()}


def test_scales_are_folded_only_on_request(itpn_clip, tmp_path):
  path, _, images, logits = itpn_clip
  options = {'image_size': 64, 'embed_dim': 32, 'depths': (2, 1, 5), 'num_heads': 4}
  options |= {'stem_blocks': (3, 2), 'num_classes': 7}
  with pytest.raises(UserError, match=r'with layer_scale=0\.1, or for .* fold_layer_scale=True'):
    hivit_jax.create_model('hivit_tiny', **options, weights=path)
  with pytest.raises(UserError, match=r'depths=\(2, 1, 5\), not .* layer_scale=0.1, not None'):
    hivit_jax.create_model('hivit_tiny', **options | {'depths': (1, 1, 5)}, weights=path)
  named = hivit_jax.create_model('hivit_tiny', **options, weights=path, fold_layer_scale=True)
  inferred = hivit_jax.create_model(weights=path, fold_layer_scale=True)
  for model in (named, inferred):
    assert not any('gamma' in name for name in exporter.state_dict(model))
    assert_close(jax.jit(lambda x, m=model: m(x))(images), logits, relative=2e-6)
  plain = tmp_path / 'plain.safetensors'
  files.write(plain, exporter.state_dict(inferred))
  with pytest.raises(UserError, match='has no scales to fold: leave out fold_layer_scale'):
    hivit_jax.create_model(weights=plain, fold_layer_scale=True)
  with pytest.raises(UserError, match='create the model with layer_scale=None'):
    hivit_jax.create_model('hivit_tiny', **options, layer_scale=0.1, weights=plain)


def test_fast_itpns_scales_fold_too(tmp_path):
  _, arrays = load_golden('fast_itpn.npz')
  files.write(tmp_path / 'x.safetensors', _fast_itpn())
  path = tmp_path / 'x.safetensors'
  model = hivit_jax.create_model(weights=path, **HEADS, fold_layer_scale=True)
  assert model.blocks[5].gamma_1 is None
  logits = jax.jit(lambda x: model(x))(arrays['image_nchw'].transpose(0, 2, 3, 1))
  assert_close(logits, arrays['logits'], relative=5e-6)


# STD: HiViT's autoencoder with a deeper decoder


def test_the_decoder_of_std_has_the_depth_of_its_file():
  state = published('STD')
  described = carried.model_of(state)
  assert described.name == 'mae_hivit_base'
  assert described.arguments['decoder_depth'] == 8
  report = fitted(state, described.name, **described.arguments)
  assert len(report.loaded) == len(state.arrays) == 405
  assert [report.new, report.dropped] == [[], []]
  back = exporter.in_layout(state)
  assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.arrays.items()}


# iTPN: an encoder, its feature pyramid and a decoder that reads it


@pytest.mark.parametrize(
  ('start', 'name', 'width'),
  [
    ('iTPN pixel base, pretrained (fpn 256)', 'mae_itpn_base', 256),
    ('iTPN pixel base, pretrained (fpn 512', 'mae_itpn_base', 512),
    ('iTPN pixel large, pretrained', 'mae_itpn_large', 256),
  ],
)
def test_itpn_is_told_from_its_files(start, name, width):
  state = published(start)
  described = carried.model_of(state)
  assert described.name == name
  arguments = described.arguments
  assert [arguments[key] for key in ('fpn_dim', 'fpn_depth', 'decoder_depth')] == [width, 2, 8]
  report = fitted(state, name, **arguments)
  assert [report.new, report.dropped, report.ignored] == [[], [], {}]
  back = exporter.in_layout(state)
  assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.arrays.items()}
  encoder = {key: arguments[key] for key in ('depths',)}
  classifier = f'hivit_{name.split("_")[-1]}'
  stem = arguments.get('stem_blocks')
  with pytest.raises(
    UserError, match=f'This is an MAE .*: load it into {name}, or load only its enc'
  ):
    fitted(state, classifier, **encoder, stem_blocks=stem)
  model = nnx.merge(*abstract_model(classifier, **encoder, stem_blocks=stem))
  report = importer.fit(model, state, partial=True)[1]
  assert set(report.new) == HEAD | tables(report)
  kept = {key: arguments[key] for key in ('fpn_dim', 'depths')}
  model = nnx.merge(*abstract_model(f'backbone_itpn_{name.split("_")[-1]}', **kept))
  report = importer.fit(model, state, partial=True)[1]
  assert not report.new
  assert {re.sub(r'\d', '', name.split('.')[0]) for name in report.dropped} == {
    'mask_token', 'decoder_embed', 'decoder_blocks', 'decoder_norm', 'decoder_pred',
    'decoder_pos_embed',
  }  # fmt: skip


def test_itpn_there_and_back_to_the_bit(tmp_path):
  state = golden_state('itpn_pixel')
  files.write(tmp_path / 'x.safetensors', state)
  model = hivit_jax.create_model(
    weights=tmp_path / 'x.safetensors', **HEADS, decoder_num_heads=4, position_overhang=0.1
  )
  _, arrays = load_golden('itpn_pixel.npz')
  images, noise = arrays['image_nchw'].transpose(0, 2, 3, 1), arrays['noise']
  assert_close(jax.jit(lambda x: model(x, noise=noise).pred)(images), arrays['pred'])
  out = exporter.state_dict(model)
  assert {k: v.tobytes() for k, v in out.items()} == {k: v.tobytes() for k, v in state.items()}
  backbone = exporter.state_dict(model, 'backbone', prefix='')
  assert set(backbone) == {k for k in state if 'decoder' not in k and k != 'mask_token'}


@pytest.mark.parametrize(('theirs', 'ours'), [(2, 1), (1, 2)])
def test_a_pyramid_of_another_depth_does_not_fit(theirs, ours):
  """Its blocks are residual: with some of them missing, every shape would fit."""
  options = TINY_MAE | {'fpn_dim': 24}
  arrays = exporter.state_dict(
    hivit_jax.create_model('mae_itpn_base', **options, fpn_depth=theirs), 'backbone', prefix=''
  )
  model = nnx.merge(*abstract_model('mae_itpn_base', **options, fpn_depth=ours))
  with pytest.raises(UserError, match=r'does not fit this model.*block_16to8\.1'):
    importer.fit(model, StateDict(arrays, 'FILE', {}))


def test_other_decoders_than_itpns_are_told(encoder):
  options = TINY_MAE | {'fpn_dim': 24, 'fpn_depth': 2}
  model = hivit_jax.create_model('mae_itpn_base', **options)
  with pytest.raises(UserError, match='has another decoder than this model'):
    importer.load_into(model, StateDict(golden_state('mae_hifeat_normpix'), 'FILE', {}))
  with pytest.raises(
    UserError, match=r'stem_blocks=\(2, 2\), not \(3, 3\): create the model that way'
  ):
    importer.load_into(model, StateDict(encoder, 'FILE', {}))
  model = hivit_jax.create_model('mae_itpn_base', **options | {'stem_blocks': (2, 2)})
  assert 'align_dim_16to8.weight' in importer.load_into(model, StateDict(encoder, 'FILE', {})).new
  options |= {'fpn_dim': 12, 'depths': (2, 2, 2)}
  narrow = nnx.merge(*abstract_model('mae_itpn_base', **options))
  with pytest.raises(
    UserError, match='The weights have fpn_dim=24, not 12: create the model that way'
  ):
    importer.fit(narrow, StateDict(golden_state('itpn_pixel'), 'FILE', {}))


# SARATR-X: autoencoders of grey images that predict features


def test_saratrx_is_told_from_its_constants_and_refused_as_one_of_pixels():
  state = published('SARATR-X: ')
  described = carried.model_of(state)
  assert described.name == 'mae_hivit_base'
  assert described.arguments['target'] == 'saratrx'
  report = fitted(state, described.name, **described.arguments)
  assert [report.new, report.dropped] == [[], []]
  assert {name.split('.')[0] for name in report.ignored} == {f'sarfeature{i}' for i in (1, 2, 3)}
  for partial in (False, True):
    with pytest.raises(UserError, match='create the model with target=saratrx'):
      importer.fit(nnx.merge(*abstract_model('mae_hivit_base')), state, partial=partial)
  model = nnx.merge(*abstract_model('mae_hivit_base', target='saratrx'))
  with pytest.raises(UserError, match=r'its decoder predicts pixels.* with target=pixels'):
    importer.fit(model, published('STD'))
  report = fitted(published('official'), 'mae_hivit_base', target='saratrx')  # as its code starts
  assert {name.split('.')[0] for name in report.new} == {
    'decoder_embed', 'decoder_blocks', 'decoder_norm', 'decoder_pred', 'decoder_pos_embed'
  }  # fmt: skip
  model = nnx.merge(*abstract_model('hivit_base'))
  report = importer.fit(model, state, partial=True)[1]
  assert set(report.new) == HEAD | tables(report)


@pytest.mark.parametrize(('size', 'decoder'), [('base', 512), ('large', 768)])
def test_saratrx_v2_is_told_from_its_constants(size, decoder):
  state = published(f'SARATR-X-v2 {size}')
  described = carried.model_of(state)
  assert described.name == f'mae_itpn_{size}'
  arguments = described.arguments
  assert (arguments['target'], arguments['decoder_embed_dim']) == ('saratrx_v2', decoder)
  report = fitted(state, described.name, **arguments)
  assert [report.new, report.dropped] == [[], []]
  assert 'hogs.simple_weights' in report.loaded
  assert {name.split('.')[0] for name in report.ignored} == {'hogs'}


@pytest.fixture
def saratrx():
  """The tiny golden model as its code has it, with constants, images and results."""
  _, arrays = load_golden('saratrx_target.npz')
  state = {k.removeprefix('param/'): v for k, v in arrays.items() if k.startswith('param/')}
  return state, arrays


def test_saratrx_there_and_back_with_its_constants(saratrx, tmp_path):
  state, arrays = saratrx
  path = tmp_path / 'x.safetensors'
  constants = {f'sarfeature{i}.weight_x1': np.ones((1, 1, 3, 3), np.float32) for i in (1, 2, 3)}
  files.write(path, state | constants)
  known = {'num_heads': 2, 'decoder_num_heads': 2}
  model = hivit_jax.create_model(weights=path, **known)
  images, noise = arrays['image_nchw'].transpose(0, 2, 3, 1), arrays['noise']
  loss = jax.jit(lambda model, x: model(x, noise=noise).loss)
  assert_close(loss(model, images.repeat(3, axis=3)), arrays['loss'])
  out = exporter.state_dict(model)
  assert set(out) - set(state) == {
    f'sarfeature{i}.weight_{half}' for i in (1, 2, 3) for half in ('x1', 'x2', 'y1', 'y2')
  }
  assert out['sarfeature2.weight_y1'].shape == (1, 1, 27, 27)
  assert [out[f'sarfeature1.weight_{k}'].sum() for k in ('x1', 'x2', 'y1', 'y2')] == [190] * 4
  assert all(out[name].tobytes() == value.tobytes() for name, value in state.items())
  files.write(path, out)
  again = hivit_jax.create_model(weights=path, **known, channels=1)
  assert_close(loss(again, images), arrays['loss'], relative=2e-5)


def test_channels_of_the_patch_embedding(saratrx):
  """One: the same function of grey images. Six: the mean of two images."""
  state, _ = saratrx
  shapes = {'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2, 'image_size': 64, 'rpe': False}
  images, other = random_images(2, 64, 64, 1).repeat(3, axis=3), random_images(2, 64, 64, 3, seed=1)
  encoder = StateDict({k: v for k, v in state.items() if 'decoder' not in k}, 'FILE', {})
  models = {}
  for channels in (1, 3, 6):
    models[channels] = hivit_jax.create_model('backbone_hivit_tiny', **shapes, channels=channels)
    report = importer.load_into(models[channels], encoder)
    assert ('patch_embed.proj.weight' in report.resized) == (channels != 3)
  run = jax.jit(lambda model, x: model.forward_features(x))
  assert_close(run(models[1], images[..., :1]), run(models[3], images), relative=5e-6)
  pair = np.concatenate([images, other], axis=3)
  assert_close(run(models[6], pair), run(models[3], (images + other) / 2), relative=5e-6)
  assert 'from 3 channels to 6, init_channels=repeat' in str(report)


def test_nothing_is_drawn_of_features():
  graphdef, params = random_model('mae_hivit_tiny', **TINY_MAE, target='saratrx')
  draw = reconstruction.Reconstructor(graphdef, mean=(0,) * 3, std=(1,) * 3)
  with pytest.raises(UserError, match='nothing to draw: the target of this model is saratrx'):
    draw(params, np.zeros((1, 64, 64, 3), np.uint8), seed=0)


# Trackers


def test_the_encoder_of_sutrack_is_told():
  state = published('SUTrack')
  described = carried.model_of(state)
  assert described.name == 'backbone_fast_itpn_base'
  arguments = described.arguments
  assert (arguments['channels'], arguments['image_size']) == (6, (224, 224))
  report = fitted(state, described.name, **arguments)
  assert [report.new, report.dropped] == [[], ['fc_norm.weight', 'fc_norm.bias']]
  assert report.resized == {'pos_embed': "the search region's"}
  assert len(report.ignored) == 4


def test_a_trackers_file_gives_its_encoder(tmp_path, caplog):
  torch = pytest.importorskip('torch')
  state = {k: v for k, v in _fast_itpn().items() if k not in HEAD}
  search = state['pos_embed']
  own = dict(state)
  own['pos_embed'] = np.concatenate([search, np.full_like(search[:, :4], 9)], axis=1)
  own['patch_embed.proj.weight'] = state['patch_embed.proj.weight'].repeat(2, axis=1) / 2
  own |= {f'template_{kind}ground_token': np.ones(32, np.float32) for kind in ('back', 'fore')}
  own |= {'search_token': np.ones(32, np.float32), 'cls_token': np.ones((1, 1, 32), np.float32)}
  net = tensors(own, 'encoder.body.') | {'box_head.conv.weight': torch.ones(3)}
  path = save(tmp_path / 'x.pth.tar', {'net': net, 'epoch': 3})
  path = path.rename(tmp_path / 'x.pth')
  with pytest.raises(UserError, match=r'unused: box_head\.conv\.weight'):
    hivit_jax.create_model(weights=path, **HEADS)
  with caplog.at_level(logging.INFO):
    model = hivit_jax.create_model(weights=path, **HEADS, partial=True)
  assert "left out, a tracker's tokens: " in caplog.text
  assert model.channels == 6
  np.testing.assert_array_equal(model.pos_embed[...], search)
  wider = hivit_jax.create_model(weights=path, **HEADS, partial=True, image_size=128)
  expected = resize.position_embedding(search, (4, 4), (8, 8))
  np.testing.assert_array_equal(wider.pos_embed[...], expected)
  with pytest.raises(UserError, match='wants to run'):
    files.read(save(tmp_path / 'y.pth', {'net': net, 'stats': pathlib.PurePath('x')}))


@pytest.mark.parametrize('whole', [False, True])
def test_a_trackers_split_position_embedding(whole):
  """The search region's is the encoder's, unless the whole one is there beside it."""
  params = random_model('hivit_tiny', **TINY, rpe=False)[1]
  state = exporter.named_arrays(params)
  encoder = {k: v for k, v in state.items() if k not in HEAD}
  own = encoder.pop('absolute_pos_embed')
  encoder |= {'pos_embed_x': own, 'pos_embed_z': own[:, :4]}
  if whole:
    encoder |= {'absolute_pos_embed': own, 'pos_embed_x': own + 1}
  arrays = files.normal_names({f'backbone.{name}': value for name, value in encoder.items()})
  state = StateDict(arrays, 'FILE', {})
  described = carried.model_of(state, num_heads=TINY['num_heads'])
  assert described.arguments['image_size'] == (64, 64)
  model, report = importer.load_new(
    lambda: hivit_jax.create_model(described.name, **described.arguments), state
  )
  np.testing.assert_array_equal(model.absolute_pos_embed[...], own)
  assert [report.new, report.dropped] == [[], []]
  told = {f'pos_embed_{part}': "a tracker's position embeddings" for part in 'zx'[: 1 + whole]}
  assert report.ignored == told


# Without scales of residual branches


def test_layer_scale_0_is_none_as_configs_can_say():
  options = TINY | {'depths': (1, 1, 2)}
  scaled = torch_names.flatten(abstract_model('fast_itpn_tiny', **options)[1])
  assert any('gamma_1' in path for path in scaled)
  for name in ('fast_itpn_tiny', 'hivit_tiny', 'mae_itpn_base'):
    graphdef, params = abstract_model(name, **options, layer_scale=0)
    assert nnx.merge(graphdef, params).settings.layer_scale is None
    assert not any({'gamma_1', 'gamma_2'} & set(path) for path in torch_names.flatten(params))
  config = {'model': options | {'name': 'fast_itpn_tiny', 'layer_scale': 0.1, 'image_size': None}}
  params = random_model('fast_itpn_tiny', **options, num_classes=3)[1]
  state = StateDict(exporter.named_arrays(params), 'FILE', {'config': config})
  folded = layer_scale.folded(state)
  described = carried.model_of(folded, image_size=64)
  assert not described.arguments['layer_scale']


# Pixel statistics


@pytest.mark.parametrize(
  ('start', 'expected'),
  [
    ('iTPN-CLIP base, finetuned', {'mean': (0.5,) * 3, 'std': (0.5,) * 3}),
    ('SARATR-X: ', {'mean': (0.0,) * 3, 'std': (1.0,) * 3}),
    ('SARATR-X-v2 base', {'mean': (0.2109,) * 3, 'std': (0.2178,) * 3}),
    ('iTPN pixel base, finetuned', {}),
    ('Fast-iTPN tiny, finetuned', {}),
  ],
)
def test_other_pixel_statistics_than_imagenets_are_known(start, expected):
  state = published(start)
  described = carried.model_of(state)
  assert carried.pixels(state, described) == expected
  assert carried.metadata(described, state)['data'] == expected
  own = {'mean': [0.1] * 3, 'std': [0.2] * 3}
  assert carried.pixels(state._replace(metadata={'data': own}), described) == own
