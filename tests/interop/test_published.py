"""Files of exactly the layouts that are published: what they are, where they load, what is said."""

import functools
import json
import logging

import jax
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, exporter, files, importer
from hivit_jax.interop.files import StateDict
from tests.helpers import (
  GOLDEN,
  TINY,
  TINY_MAE,
  abstract_model,
  assert_close,
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


def fitted(state: StateDict, name: str, **options) -> importer.LoadReport:
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
    assert 'is backbone_hivit_tiny: it has nothing to classify with. Finetune it first' in line
  files.write(path, exporter.state_dict(hivit_jax.create_model('backbone_hivit_tiny'), prefix=''))
  out = f'--out={tmp_path / "y"}'
  done = forks('hivit_jax/tools/convert.py', 'from-torch', str(path), out, '--model=hivit_tiny')
  assert done.status == 2
  assert 'head.weight' in done.stderr
  assert f'--config.init={path}' in done.stderr
