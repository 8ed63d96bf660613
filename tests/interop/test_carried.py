"""The model that weights carry: exact, with overrides on top, and guesses said."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, exporter, files, importer
from hivit_jax.interop.files import StateDict
from hivit_jax.train import weights
from hivit_jax.train.checkpoint import Checkpoints
from tests.helpers import (
  TINY,
  TINY_MAE,
  TINY_VIT,
  abstract_model,
  random_images,
  random_model,
)
from tests.interop_files import golden_state, official, save

# Each another than the default, and none of them shown by a shape.
HIDDEN = {'mask_ratio': 0.6, 'norm_pix_loss': False, 'num_heads': 2, 'decoder_num_heads': 4}
MODEL = TINY_MAE | HIDDEN | {'drop_path_rate': 0.25}
NAMES = ['ant', 'bee']
DATA = {'mean': [0.6, 0.4, 0.5], 'std': [0.2, 0.3, 0.4], 'eval_crop': 0.8, 'name': 'digits'}


@pytest.fixture(scope='module')
def pretrained():
  return random_model('mae_hivit_tiny', **MODEL)


@pytest.fixture(scope='module')
def workdir(pretrained, tmp_path_factory):
  """As a pretraining run leaves it."""
  path = tmp_path_factory.mktemp('run')
  own = {key: value for key, value in MODEL.items() if key != 'image_size'}
  computation = {'dtype': 'bfloat16', 'attention': 'xla', 'remat': True, 'scan': False}
  config = {
    'task': 'mae', 'image_size': (64, 64), 'channels': 3, 'data': DATA,
    'model': own | computation | {'name': 'mae_hivit_tiny', 'rpe': None},
  }  # fmt: skip
  with Checkpoints(path / 'checkpoints') as checkpoints:
    checkpoints.save(5, {'params': pretrained[1]}, {'config': config, 'class_names': NAMES})
  return path


def _loss(model) -> np.ndarray:
  images = random_images(2, 64, 64, 3)
  noise = np.random.default_rng(1).random((2, 16), np.float32)
  graphdef, params = nnx.split(model)
  forward = jax.jit(lambda params: nnx.merge(graphdef, params)(images, noise=noise).loss)
  return np.asarray(forward(params))


def _warnings(caplog) -> list[str]:
  return [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']


@pytest.fixture(scope='module')
def loss(pretrained):
  return _loss(nnx.merge(*pretrained))


@pytest.fixture
def convert(forks):
  def call(*arguments):
    done = forks('hivit_jax/tools/convert.py', *map(str, arguments))
    assert done.status == 0, done.stderr
    return done

  return call


@pytest.mark.parametrize('name', [None, 'mae_hivit_tiny'])
def test_a_workdir_gives_its_model_to_the_bit(workdir, loss, caplog, name):
  model = hivit_jax.create_model(name, weights=workdir)
  assert _loss(model).tobytes() == loss.tobytes()
  assert max(model.drop_path_rates) == 0.25
  assert not _warnings(caplog)
  other = hivit_jax.create_model(name, weights=workdir, mask_ratio=0.75, norm_pix_loss=True)
  assert (other.mask_ratio, other.norm_pix_loss) == (0.75, True)
  assert other.blocks[-1].attn.heads == 2


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_exported_files_give_it_too_and_official_code_reads_them(
  convert, workdir, loss, caplog, tmp_path, suffix
):
  file, back = tmp_path / f'x{suffix}', tmp_path / 'back'
  if suffix == '.pth':
    torch = pytest.importorskip('torch')
  convert('to-torch', workdir, f'--out={file}')
  convert('from-torch', file, f'--out={back}')
  for path in (file, back):
    assert _loss(hivit_jax.create_model(weights=path)).tobytes() == loss.tobytes()
  assert not _warnings(caplog)
  read = files.read(file)
  assert read.metadata['class_names'] == NAMES
  assert read.metadata['data'] == {key: DATA[key] for key in ('mean', 'std', 'eval_crop')}
  assert read.metadata['image_size'] == [64, 64]
  arguments = read.metadata['model']['arguments']
  assert HIDDEN.items() <= arguments.items()
  assert not {'dtype', 'attention', 'remat'} & arguments.keys()
  if suffix == '.pth':
    content = torch.load(file, weights_only=True)
    assert set(content['model']) == set(read.arrays)
    assert isinstance(content['hivit_jax'], str)


def test_the_backbone_of_an_exported_autoencoder_has_its_heads(convert, workdir, tmp_path, caplog):
  convert('to-torch', workdir, f'--out={tmp_path / "x.safetensors"}', '--layout=backbone')
  model = hivit_jax.create_model(weights=tmp_path / 'x.safetensors')
  assert model.blocks[-1].attn.heads == 2
  assert not _warnings(caplog)
  images = random_images(1, 64, 64, 3)
  whole = hivit_jax.create_model(weights=workdir)
  np.testing.assert_array_equal(model.forward_features(images), whole.forward_features(images))


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('mae_itpn_base', TINY_MAE),
    ('backbone_itpn_base', TINY | {'join_stages': True}),
    ('backbone_hivit_tiny', TINY | {'window_size': 2, 'global_blocks': (1,), 'rpe': False}),
  ],
)
def test_an_exported_backbone_is_the_one_that_it_was(tmp_path, name, options):
  pyramid = {'fpn_dim': 12, 'fpn_depth': 1} if 'itpn' in name else {}
  graphdef, params = random_model(name, **options, **pyramid)
  metadata = {'model': {'name': name, 'arguments': options | pyramid}}
  state = StateDict(exporter.named_arrays(params), 'FILE', metadata)
  arrays = exporter.in_layout(state, 'backbone')
  exported = exporter.in_layout_described(state, carried.model_of(state), arrays, 'backbone')
  path = tmp_path / 'x.safetensors'
  files.write(path, arrays, metadata=carried.metadata(exported, state))
  model = hivit_jax.create_model(weights=path)
  images = random_images(1, 64, 64, 3)
  if name.startswith('backbone_'):
    expected = nnx.merge(graphdef, params)(images)
  else:
    backbone = hivit_jax.create_model(f'backbone_{name.removeprefix("mae_")}', **TINY, **pyramid)
    importer.load_into(backbone, state, partial=True)
    expected = backbone(images)
  for actual, wanted in zip(model(images), expected, strict=True):
    np.testing.assert_array_equal(actual, wanted)


def test_a_probes_batch_norm_is_part_of_the_last_layer_in_exported_files():
  options = TINY | {'num_classes': 5, 'head_batch_norm': True}
  params = random_model('hivit_tiny', **options)[1]
  metadata = {'model': {'name': 'hivit_tiny', 'arguments': options}}
  state = StateDict(exporter.named_arrays(params), 'FILE', metadata)
  described = carried.model_of(state)
  exported = exporter.in_layout(state, 'official')
  model = exporter.in_layout_described(state, described, exported, 'official')
  assert described.arguments['head_batch_norm']
  assert model.arguments == described.arguments | {'head_batch_norm': False}


def _state(name: str) -> StateDict:
  return StateDict(files.normal_names(golden_state(name)), 'FILE', {})


def _vit() -> StateDict:
  model = nnx.merge(*random_model('vit_base', num_classes=3, **TINY_VIT))
  return StateDict(exporter.state_dict(model), 'FILE', {})


@pytest.mark.parametrize(
  ('state', 'known', 'guessed'),
  [
    (functools.partial(_state, 'hivit_rpe'), {}, ()),  # its tables show the heads
    (_vit, {}, ('num_heads',)),
    (_vit, {'num_heads': 1}, ()),
    (
      functools.partial(_state, 'mae_hifeat_normpix'),
      {'num_heads': 4},
      ('decoder_num_heads', 'mask_ratio', 'norm_pix_loss'),
    ),
    (
      functools.partial(_state, 'mae_hifeat_normpix'),
      {'num_heads': 4, 'decoder_num_heads': 2, 'norm_pix_loss': False},
      ('mask_ratio',),
    ),
    (functools.partial(_state, 'simmim_swin'), {}, ('mask_ratio',)),
  ],
)
def test_one_warning_names_what_a_foreign_file_does_not_say(caplog, state, known, guessed):
  described = carried.model_of(state(), **known)
  assert described.guessed == guessed
  assert known.items() <= described.arguments.items()
  texts = _warnings(caplog)
  assert len(texts) == bool(guessed)
  for key in guessed:
    assert f'{key} (assumed {described.arguments[key]})' in texts[0]


def test_a_guess_stays_one_in_converted_files(convert, tmp_path, caplog):
  pytest.importorskip('torch')
  path = save(tmp_path / 'x.pth', official(golden_state('mae_hifeat_normpix')))
  known = ('--num_heads=4', '--decoder_num_heads=2', '--mask_ratio=0.6')
  said = convert('from-torch', path, f'--out={tmp_path / "dir"}', *known).stderr
  assert 'does not say norm_pix_loss (assumed True)' in said
  model = hivit_jax.create_model(weights=tmp_path / 'dir')
  assert model.mask_ratio == 0.6
  (text,) = _warnings(caplog)
  assert 'does not say norm_pix_loss (assumed True)' in text
  caplog.clear()
  convert('to-torch', tmp_path / 'dir', f'--out={tmp_path / "y.pth"}', '--norm_pix_loss=False')
  assert not hivit_jax.create_model(weights=tmp_path / 'y.pth').norm_pix_loss
  assert not _warnings(caplog)


@pytest.mark.parametrize('key', ['num_heads', 'decoder_num_heads'])
def test_other_heads_than_trained_with_are_refused(workdir, key):
  state = weights.read(workdir)
  autoencoder = nnx.merge(*abstract_model('mae_hivit_tiny', **(TINY_MAE | HIDDEN | {key: 1})))
  with pytest.raises(
    UserError, match=rf'with {key}={HIDDEN[key]}, the model has 1: create the mod'
  ):
    importer.fit(autoencoder, state)
  # Those of a decoder do not matter where there is none.
  heads = HIDDEN['num_heads'] if key == 'decoder_num_heads' else 1
  classifier = nnx.merge(*abstract_model('hivit_tiny', **(TINY | {'num_heads': heads})))
  if key == 'num_heads':
    with pytest.raises(UserError, match='with num_heads=2, the model has 1'):
      importer.fit(classifier, state, partial=True)
  else:
    importer.fit(classifier, state, partial=True)
