"""The command that converts weights, and runs that start from converted ones."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import nnx

import hivit_jax
from configs import demo
from configs import evaluate as evaluation
from hivit_jax.errors import UserError
from hivit_jax.interop import exporter, files
from hivit_jax.tasks.images import normalize
from hivit_jax.tools import convert
from hivit_jax.train import inputs
from hivit_jax.train.checkpoint import Checkpoints, load_params
from hivit_jax.train.run import evaluate, train
from hivit_jax.train.weights import read
from tests import patience
from tests.helpers import TINY_SWIN, TINY_VIT, random_model
from tests.interop_files import golden_state, official, save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run():
  """Calls the command in this process: `run('to-torch', path, out=..., layout=...)`."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['test'])

  def call(command, path, **options):
    with flagsaver.flagsaver(**{key: _text(value) for key, value in options.items()}):
      convert.main(['convert', command, str(path)])

  return call


def _text(value):
  return str(value) if isinstance(value, Path) else value


def test_pth_to_checkpoint_to_pth_to_safetensors_and_back(run, tmp_path):
  torch = pytest.importorskip('torch')
  state = golden_state('mae_hifeat_normpix')
  path = save(tmp_path / 'mae.pth', official(state))
  run('from-torch', path, out=tmp_path / 'dir', num_heads=4, decoder_num_heads=2)
  run('to-torch', tmp_path / 'dir', out=tmp_path / 'back.pth')
  back = torch.load(tmp_path / 'back.pth', weights_only=True)
  assert list(back) == ['model', 'hivit_jax']
  run('from-torch', tmp_path / 'back.pth', out=tmp_path / 'x.safetensors')
  run('to-torch', tmp_path / 'x.safetensors', out=tmp_path / 'last.pth', layout='mae')
  last = torch.load(tmp_path / 'last.pth', weights_only=True)
  for content in (back, last):
    assert set(content['model']) == set(state)
    for name, value in content['model'].items():
      assert value.numpy().tobytes() == state[name].tobytes()
  # The head counts, which no shape shows, travelled along.
  for path in ('dir', 'back.pth', 'x.safetensors', 'last.pth'):
    model = hivit_jax.create_model(weights=tmp_path / path)
    assert model.blocks[-1].attn.heads == 4
    assert model.decoder_blocks[0].attn.heads == 2


@pytest.mark.parametrize(
  ('name', 'options'), [('vit_base', TINY_VIT), ('swin_tiny', TINY_SWIN)], ids=['vit', 'swin']
)
def test_a_baseline_goes_there_and_back_and_is_evaluated_by_its_weights_alone(
  run, tmp_path, capsys, name, options
):
  model = nnx.merge(*random_model(name, num_classes=10, **options))
  state = exporter.state_dict(model)
  files.write(tmp_path / 'x.safetensors', state)
  run('from-torch', tmp_path / 'x.safetensors', out=tmp_path / 'dir')
  run('to-torch', tmp_path / 'dir', out=tmp_path / 'back.safetensors')
  back, _ = files._read_safetensors(tmp_path / 'back.safetensors')
  assert {k: (v.dtype, v.tobytes()) for k, v in back.items()} == {
    k: (v.dtype, v.tobytes()) for k, v in state.items()
  }
  config = evaluation.get_config()
  config.init = str(tmp_path / 'back.safetensors')
  config.image_size = options['image_size']
  config.data.update(name='digits', eval_split='test[:16]', eval_crop=1.0)
  config.evaluation.batch_size = 16
  capsys.readouterr()
  evaluate(config, None, str(tmp_path / 'none'))
  metrics = json.loads(capsys.readouterr().out)
  source = inputs.open_source(config, config.data.eval_split, 'data.eval_split')
  transform = inputs.eval_transform(config)
  with inputs.eval_batches(config, source, transform, 16, alone=True) as batches:
    batch = next(batches)
  images = normalize(batch['image'], config.data.mean, config.data.std)
  own = optax.softmax_cross_entropy_with_integer_labels(
    jax.jit(model.__call__)(images), batch['label']
  )
  assert metrics['eval/loss'] == pytest.approx(float(own.mean()), rel=1e-4)


def test_layouts_differ_in_names_and_wrapping(run, tmp_path):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'x.safetensors'
  files.write(path, golden_state('hivit_rpe'))
  wrapped = {'official': 'model', 'backbone': 'state_dict', 'mmpretrain': 'state_dict'}
  for layout, key in wrapped.items():
    run('to-torch', path, out=tmp_path / 'y.pth', layout=layout, num_heads=4)
    content = torch.load(tmp_path / 'y.pth', weights_only=True)
    assert list(content) == [key, 'hivit_jax']
    bare = all(not name.startswith('backbone.') for name in content[key])
    assert bare == (layout == 'official')
  run('to-torch', path, out=tmp_path / 'y.safetensors', layout='backbone', prefix='', num_heads=4)
  assert 'patch_embed.proj.weight' in files._read_safetensors(tmp_path / 'y.safetensors')[0]


def test_to_hub_takes_what_a_file_does_not_say(run, tmp_path):
  files.write(tmp_path / 'x.safetensors', golden_state('hivit_rpe'))
  run('to-hub', tmp_path / 'x.safetensors', out=tmp_path / 'y', image_size='32x128')
  assert hivit_jax.create_model(f'local-dir:{tmp_path}/y').image_size == (32, 128)


def test_a_workdir_has_weights_and_averaged_weights(run, tmp_path):
  state = golden_state('hivit_rpe')
  files.write(tmp_path / 'x.safetensors', state)
  run('from-torch', tmp_path / 'x.safetensors', out=tmp_path / 'a', num_heads=4)
  restored = load_params(tmp_path / 'a')
  params = jax.tree.map(jnp.asarray, restored.state)
  averaged = jax.tree.map(lambda x: x + 1, params)
  with Checkpoints(tmp_path / 'b' / 'checkpoints') as checkpoints:
    checkpoints.save(7, {'params': params, 'ema': averaged}, restored.metadata)
  for path in (tmp_path / 'b', tmp_path / 'b/checkpoints', tmp_path / 'b/checkpoints/7'):
    assert read(path).arrays['head.bias'].tobytes() == state['head.bias'].tobytes()
  model = hivit_jax.create_model(weights=tmp_path / 'b', ema=True)
  np.testing.assert_array_equal(model.head.bias[...], state['head.bias'] + 1)
  with pytest.raises(UserError, match='ema'):
    read(tmp_path / 'a', ema=True)


@pytest.mark.parametrize(
  ('command', 'options', 'message'),
  [
    ('from-torch', {'out': 'x.pth'}, 'give a directory or a .safetensors file'),
    ('to-torch', {'out': 'x'}, 'must end in .pth or .safetensors'),
    ('to-torch', {'out': 'x.pth', 'layout': 'maee'}, 'layout "maee" is unknown'),
    ('to-torch', {'out': 'x.pth', 'layout': 'official'}, 'MAE checkpoint.*--layout=mae, or'),
    ('from-torch', {'out': 'y', 'model': 'hivit_tiny'}, 'does not fit this model'),
    ('from-torch', {'out': 'y', 'model': 'hivit_tny'}, 'did you mean "hivit_tiny"'),
    ('from-torch', {'out': 'y', 'image_size': '64y'}, '--image_size=64y: expected a side'),
    ('to-hub', {'out': 'y', 'layout': 'mae'}, 'to-hub has no --layout'),
    ('to-hub', {'out': 'y', 'prefix': ''}, 'to-hub has no --prefix'),
    ('to-hub', {'out': 'y', 'model': 'hivit_tiny'}, 'to-hub has no --model'),
    ('to-hub', {'out': 'y', 'partial': True}, 'to-hub has no --partial'),
    ('from_torch', {'out': 'y'}, 'did you mean "from-torch"'),
    ('from-torch', {}, 'where to'),
  ],
)
def test_mistakes_are_named(run, tmp_path, monkeypatch, command, options, message):
  monkeypatch.chdir(tmp_path)
  files.write('mae.safetensors', golden_state('mae_hifeat_normpix'))
  with pytest.raises(UserError, match=message):
    run(command, 'mae.safetensors', num_heads=4, **options)
  assert [path.name for path in tmp_path.iterdir()] == ['mae.safetensors']


@pytest.mark.parametrize('command', ['from-torch', 'to-torch'])
def test_numbers_that_are_none_are_not_converted(run, tmp_path, command):
  state = golden_state('hivit_rpe')
  for name in ('blocks.6.mlp.fc1.weight', 'head.bias'):
    state[name][0] = np.nan if name == 'head.bias' else np.inf
  files.write(tmp_path / 'x.safetensors', state)
  with pytest.raises(UserError, match=r'x\.safetensors was not converted: .* and 1 more param'):
    run(command, tmp_path / 'x.safetensors', out=tmp_path / 'y.safetensors')
  assert not (tmp_path / 'y.safetensors').exists()


def test_what_orbax_logs_is_not_shown(forks, tmp_path):
  files.write(tmp_path / 'x.safetensors', golden_state('hivit_rpe'))
  arguments = ('from-torch', str(tmp_path / 'x.safetensors'), f'--out={tmp_path / "dir"}')
  status, stderr, stdout = forks('hivit_jax/tools/convert.py', *arguments)
  assert (status, stderr) == (0, '')
  assert stdout.splitlines()[-1].startswith('wrote hivit_tiny, ')


def test_as_a_process_a_hostile_file_is_one_line_and_status_2(tmp_path):
  (tmp_path / 'x.pth').write_bytes(b'\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.')
  done = subprocess.run(
    [sys.executable, '-m', 'hivit_jax.tools.convert', 'from-torch', tmp_path / 'x.pth', '--out=y'],
    cwd=ROOT, capture_output=True, text=True, timeout=patience.limit(120),
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  assert done.stderr.startswith('error: ')
  assert 'x.pth' in done.stderr


def test_a_run_starts_from_converted_weights_at_another_image_size_by_config_alone(
  run, tmp_path, caplog
):
  files.write(tmp_path / 'x.safetensors', golden_state('mae_hifeat_normpix'))
  config = demo.get_config('debug')
  config.image_size = (32, 32)  # the weights are for 64
  config.model.update(num_heads=4, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
  config.init = str(tmp_path / 'x.safetensors')
  config.optim.lr = 0.0
  config.knn.every_epochs = 0.0
  config.pictures.every_epochs = 0.0
  config.max_steps = 1
  with caplog.at_level(logging.INFO):
    train(config, str(tmp_path / 'run'))
  trained = read(tmp_path / 'run').arrays
  state = golden_state('mae_hifeat_normpix')
  assert trained['absolute_pos_embed'].shape == (1, 4, 32)
  for name in set(state) - {'absolute_pos_embed', 'decoder_pos_embed'}:
    np.testing.assert_array_equal(trained[name], state[name], err_msg=name)
  assert 'from 4x4 to 2x2 units' in caplog.text
