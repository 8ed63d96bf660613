"""Directories that others load: every model comes back bit for bit, and its config is timm's."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, exporter
from hivit_jax.train import publish, weights
from hivit_jax.train.checkpoint import Checkpoints
from tests.helpers import (
  TINY,
  TINY_SWIN,
  TINY_VIT,
  random_images,
  random_model,
)

NAMES = ['ant', 'bee', 'cat']
GREY = {'mean': [0.5], 'std': [0.25]}
VIT = TINY_VIT | {'num_classes': 3}
SWIN = TINY_SWIN | {'num_classes': 3}
DENSE = TINY | {'num_classes': 3, 'embed_dim': 16}
MODELS = {
  'hivit_tiny': TINY | {'num_classes': 3},
  'hivit_base': TINY | {'embed_dim': 512, 'num_classes': 0, 'rpe': False, 'channels': 1},
  'fast_itpn_tiny': TINY | {'num_classes': 3},
  'vit_base': VIT,
  'swin_tiny': SWIN,
  'mae_vit_base': TINY_VIT
  | {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2, 'mask_ratio': 0.5},
  'simmim_swin_tiny': TINY_SWIN | {'mask_ratio': 0.5},
  'backbone_itpn_base': TINY | {'stem_blocks': (1, 2), 'fpn_dim': 16, 'fpn_depth': 1},
  'segment_hivit_tiny': DENSE | {'head_channels': 8, 'auxiliary_channels': 0},
  'detect_hivit_tiny': DENSE
  | {'neck_channels': 8, 'hidden': 16, 'global_blocks': (1,), 'cascade': True},
}
# Where it is not ours and what differs from its defaults: timm's architecture and arguments.
CONFIGS = {
  'vit_base': (
    'vit_base_patch16_224',
    {'embed_dim': 64, 'depth': 1, 'num_heads': 1, 'mlp_ratio': 4.0, 'img_size': [32, 32],
     'in_chans': 3, 'global_pool': 'avg'},
  ),
  'swin_tiny': (
    'swin_tiny_patch4_window7_224',
    {'embed_dim': 8, 'depths': [2, 1], 'num_heads': [1, 2], 'mlp_ratio': 4.0, 'window_size': 4,
     'img_size': [32, 32], 'in_chans': 3},
  ),
  'hivit_tiny': (
    'hivit_tiny',
    {'image_size': [64, 64], 'embed_dim': 32, 'depths': [1, 1, 2], 'num_heads': 4,
     'num_classes': 3},
  ),
}  # fmt: skip


@functools.cache
def _random(name: str, **more):
  graphdef, params = random_model(name, **MODELS[name] | more)
  if name.startswith('fast_itpn'):  # a bias of the keys changes nothing, and its layout has none
    for block in params['blocks'].values():
      if 'attn' in block:
        query, _, value = np.split(block['attn']['qkv']['bias'], 3)
        block['attn']['qkv']['bias'] = np.concatenate([query, np.zeros_like(query), value])
  return nnx.merge(graphdef, params)


def _arrays(model) -> dict[str, np.ndarray]:
  return exporter.named_arrays(nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.parametrize('name', MODELS)
def test_a_saved_model_comes_back_with_every_bit_and_argument(name, tmp_path):
  model = _random(name)
  pixels = GREY if model.channels == 1 else {}
  names = NAMES if MODELS[name].get('num_classes') else None
  hivit_jax.save_pretrained(model, tmp_path, class_names=names, **pixels)
  back = hivit_jax.create_model(f'local-dir:{tmp_path}')
  assert type(back) is type(model)
  assert back.settings == model.settings
  expected, actual = _arrays(model), _arrays(back)
  assert expected.keys() == actual.keys()
  for key, value in expected.items():
    assert value.tobytes() == actual[key].tobytes(), key
  assert carried.of_model(model).name == weights.read(tmp_path).metadata['model']['name'] == name
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['pretrained_cfg']['input_size'] == [model.channels, *model.image_size]
  assert config.get('label_names') == names
  cropped = not name.startswith(('segment', 'detect'))
  assert ('crop_pct' in config['pretrained_cfg']) == cropped
  assert ('central crop' in _card(tmp_path)) == cropped
  if name in ('hivit_base', 'swin_tiny'):
    images = jax.ShapeDtypeStruct((1, *model.image_size, model.channels), 'float32')
    assert config['num_features'] == jax.eval_shape(model.pooled, images).shape[1]


@pytest.mark.parametrize('name', CONFIGS)
def test_the_config_is_timms(name, tmp_path):
  """docs/guide/weights.md says how timm itself was asked."""
  hivit_jax.save_pretrained(_random(name), tmp_path, mean=(0.5, 0.4, 0.3), eval_crop=0.9)
  config = json.loads((tmp_path / 'config.json').read_text())
  assert (config['architecture'], config['model_args']) == CONFIGS[name]
  assert config['num_classes'] == 3
  known = config['pretrained_cfg']
  assert (known['mean'], known['std']) == ([0.5, 0.4, 0.3], [0.229, 0.224, 0.225])
  assert (known['crop_pct'], known['interpolation'], known['num_classes']) == (0.9, 'bicubic', 3)
  library = 'hivit_jax' if name == 'hivit_tiny' else 'timm'
  assert f'library_name: {library}\npipeline_tag: image-classification' in _card(tmp_path)


def test_a_vit_has_the_names_and_shapes_that_timm_has(tmp_path):
  hivit_jax.save_pretrained(_random('vit_base'), tmp_path)
  block = {
    'norm1.weight': (64,), 'norm1.bias': (64,), 'attn.qkv.weight': (192, 64),
    'attn.qkv.bias': (192,), 'attn.proj.weight': (64, 64), 'attn.proj.bias': (64,),
    'norm2.weight': (64,), 'norm2.bias': (64,), 'mlp.fc1.weight': (256, 64),
    'mlp.fc1.bias': (256,), 'mlp.fc2.weight': (64, 256), 'mlp.fc2.bias': (64,),
  }  # fmt: skip
  assert {k: v.shape for k, v in load_file(tmp_path / 'model.safetensors').items()} == {
    'cls_token': (1, 1, 64), 'pos_embed': (1, 5, 64), 'patch_embed.proj.weight': (64, 3, 16, 16),
    'patch_embed.proj.bias': (64,), **{f'blocks.0.{k}': v for k, v in block.items()},
    'fc_norm.weight': (64,), 'fc_norm.bias': (64,), 'head.weight': (3, 64), 'head.bias': (3,),
  }  # fmt: skip


def test_a_directory_by_timm_brings_size_statistics_and_class_names(tmp_path, caplog):
  model = _random('vit_base', image_size=(32, 64))
  hivit_jax.save_pretrained(model, tmp_path, mean=(0.5, 0.4, 0.3), class_names=NAMES)
  save_file(load_file(tmp_path / 'model.safetensors'), tmp_path / 'model.safetensors')
  state = weights.read(tmp_path)
  assert carried.statistics(state, carried.model_of(state))['mean'] == (0.5, 0.4, 0.3)
  assert state.metadata['class_names'] == NAMES
  back = hivit_jax.create_model(weights=tmp_path)
  assert back.image_size == (32, 64)
  assert 'does not say num_heads' in caplog.text  # other code: shapes do not show it
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(UserError, match=r'config\.json is not the config\.json of a model'):
    weights.read(tmp_path)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """As a run leaves it, with averaged weights."""
  path = tmp_path_factory.mktemp('run')
  options = {k: v for k, v in VIT.items() if k != 'image_size'}
  config = {
    'task': 'classify', 'image_size': [32, 32], 'channels': 3, 'init': 'mae.pth', 'epochs': 100,
    'batch_size': 128, 'seed': 7, 'model': options | {'name': 'vit_base', 'dtype': 'auto'},
    'data': {'name': 'folder:/insects', 'train_split': 'train[:90%]', 'mean': [0.1, 0.2, 0.3],
             'std': [0.4, 0.5, 0.6], 'eval_crop': 1.0},
  }  # fmt: skip
  state = {
    key: random_model('vit_base', seed=seed, **VIT)[1] for seed, key in enumerate(('params', 'ema'))
  }
  with Checkpoints(path / 'checkpoints') as checkpoints:
    checkpoints.save(20, state, {'config': config, 'class_names': NAMES})
  run = {
    'command': 'python main.py --config=a|b.py', 'python': '3.12.1', 'git': {'commit': 'c0ffee'},
    'versions': {'jax': '0.12.0', 'tensorboard': '2'}, 'devices': {'kind': 'H100', 'count': 8},
  }  # fmt: skip
  (path / 'config.json').write_text(json.dumps({'config': config, 'runs': [{}, run]}))
  rows = (
    {'step': 10, 'eval/top1': 0.5, 'eval/loss': 1.5}, {'step': 20, 'train/loss': 1.0},
    {'step': 20, 'eval/top1': 0.75}, {'step': 30, 'eval/top1': 0.25},
  )  # fmt: skip
  (path / 'metrics.jsonl').write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  return path


def _card(directory) -> str:
  return (directory / 'README.md').read_text('utf-8')


@pytest.mark.parametrize('inner', ['', 'checkpoints/20'])
def test_the_card_of_a_run_says_how_it_was_trained_and_what_it_reached(workdir, inner, tmp_path):
  hivit_jax.save_pretrained(workdir / inner, tmp_path)
  text = _card(tmp_path)
  for row in (
    '| data | folder:/insects, train[:90%] |', '| initial weights | mae.pth |', '| epochs | 100 |',
    '| batch size | 128 |', '| eval/top1 | 0.75 (step 20) |', '| eval/loss | 1.5 (step 10) |',
    '| command | `python main.py --config=a\\|b.py` |', '| devices | 8 x H100 |',
    '| versions | jax 0.12.0 |', '| commit | c0ffee |',
  ):  # fmt: skip
    assert row in text.splitlines()
  assert 'Classifier of 3 classes for images of 32x32 pixels' in text
  assert 'pixels in [0, 1], minus 0.1, 0.2, 0.3, divided by 0.4, 0.5, 0.6' in text
  (tmp_path / 'README.md').write_text('mine')
  hivit_jax.save_pretrained(workdir, tmp_path)
  assert _card(tmp_path) == 'mine'


def test_a_workdir_becomes_a_directory_that_predicts_the_same(workdir, tmp_path, forks):
  done = forks(
    'hivit_jax/tools/convert.py', 'to-hub', str(workdir), f'--out={tmp_path}', '--ema=true'
  )
  assert done.status == 0, done.stderr
  images = random_images(2, 32, 32, 3)
  forward = jax.jit(lambda model, images: model(images))
  expected = forward(hivit_jax.create_model(weights=workdir, ema=True), images)
  saved = hivit_jax.create_model(f'local-dir:{tmp_path}')
  assert np.asarray(forward(saved, images)).tobytes() == np.asarray(expected).tobytes()
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['label_names'] == NAMES
  assert config['pretrained_cfg']['crop_pct'] == 1.0
  # Once more, from what was saved: nothing is lost.
  hivit_jax.save_pretrained(tmp_path, tmp_path / 'again')
  assert json.loads((tmp_path / 'again' / 'config.json').read_text()) == config


@pytest.mark.parametrize('entry', ['checkpoints', 'metrics.jsonl'])
def test_a_run_is_not_overwritten(entry, tmp_path):
  (tmp_path / 'config.json').write_text('mine')
  (tmp_path / entry).mkdir()
  with pytest.raises(UserError, match=rf'^{tmp_path} is the workdir of a run, whose config\.json'):
    hivit_jax.save_pretrained(_random('vit_base'), tmp_path)
  assert (tmp_path / 'config.json').read_text() == 'mine'
  assert not (tmp_path / 'model.safetensors').exists()


def test_mistakes_have_one_line(tmp_path):
  with pytest.raises(UserError, match='class_names has 3 names for 4 classes'):
    hivit_jax.save_pretrained(_random('vit_base', num_classes=4), tmp_path, class_names=NAMES)
  with pytest.raises(UserError, match=r'mean=.*: the model has 1 channels, give a number for each'):
    hivit_jax.save_pretrained(_random('vit_base', channels=1), tmp_path)
  with pytest.raises(UserError, match=r'eval_crop=90: expected a share of the sides, in \(0, 1\]'):
    hivit_jax.save_pretrained(_random('vit_base'), tmp_path, eval_crop=90)
  with pytest.raises(UserError, match='ema=True takes the averaged weights of a path'):
    hivit_jax.save_pretrained(_random('vit_base'), tmp_path, ema=True)
  with pytest.raises(UserError, match='Linear is none of the models'):
    hivit_jax.save_pretrained(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path)
  with pytest.raises(UserError, match='has weights of its own'):
    hivit_jax.create_model('local-dir:here', weights='there.pth')
  with pytest.raises(UserError, match=r'nowhere does not exist'):
    hivit_jax.create_model(f'local-dir:{tmp_path}/nowhere')
  with pytest.raises(UserError, match=r'num_heads=\.\.\.: the model has its arguments'):
    hivit_jax.save_pretrained(_random('vit_base'), tmp_path, num_heads=4)
  broken = nnx.clone(_random('vit_base'))
  broken.head.bias[...] = np.nan
  with pytest.raises(UserError, match=r'head\.bias holds NaN'):
    publish.save_pretrained(broken, tmp_path)
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot write'):
    publish.save_pretrained(_random('vit_base'), tmp_path / 'file')
