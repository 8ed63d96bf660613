"""From pretraining to finetuning, evaluation and k-NN, as a user would do it."""

import json
import pathlib
import sys
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from flax import nnx

from hivit_jax.interop import exporter, files
from hivit_jax.train.checkpoint import load_metadata, load_params
from tests.helpers import TINY, random_model
from tests.runs import metrics, on_devices

STEPS = 4
# 35 examples: the last batch of 8, or of 15 on three devices, is not full.
DATA = {'data.name': 'digits', 'data.train_split': 'train[:64]', 'data.eval_split': 'test[:35]'}
SETTINGS = DATA | {
  'image_size': '48,32',
  'batch_size': 12,
  'evaluation.batch_size': 8,
  'evaluation.every_epochs': 0.25,
  'ema_decay': 0.5,
  'optim.warmup_epochs': 0.1,
  'optim.lr': 0.02,
}


def _command(config: str, *arguments: str, **settings) -> list[str]:
  flags = [f'--config.{key}={value}' for key, value in settings.items()]
  return [sys.executable, 'main.py', f'--config=configs/{config}', *arguments, *flags]


def _run(runs, config: str, *arguments: str, devices: int = 1, **settings):
  return runs.finish(_command(config, *arguments, **settings), on_devices(devices))


def _finetune(runs, init: pathlib.Path, workdir: pathlib.Path, steps: int = STEPS) -> str:
  settings = SETTINGS | {'init': init, 'max_steps': steps}
  done = _run(runs, 'finetune_hivit_t.py:debug', f'--workdir={workdir}', **settings)
  assert done.returncode == 0, done.stderr
  return done.stderr


@pytest.fixture(scope='module')
def finetuned(runs, finished, tmp_path_factory):
  """Workdir and log of a finetuning of the tiny pretraining run."""
  workdir = tmp_path_factory.mktemp('finetuned') / 'run'
  return workdir, _finetune(runs, finished.workdir, workdir)


def _evaluate(
  runs, *arguments: str, config: str = 'evaluate.py', devices: int = 1, **settings
) -> dict[str, float]:
  """What a user gets who names the weights and nothing else, unless it is given here."""
  done = _run(runs, config, '--mode=evaluate', *arguments, devices=devices, **settings)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def _accuracies(row: Mapping[str, float], prefix: str = '') -> dict[str, float]:
  return {key: row[f'eval/{prefix}{key}'] for key in ('top1', 'top5', 'loss')}


def test_finetuning_starts_from_pretrained_weights_at_another_size_and_says_so(finished, finetuned):
  workdir, log = finetuned
  assert f'parameters from step 40 of {finished.workdir}' in log
  assert 'resized absolute_pos_embed from 2x2 to 3x2 units, bicubic' in log
  dropped = next(line for line in log.splitlines() if 'dropped, no place in this model' in line)
  assert 'mask_token' in dropped
  assert 'decoder_blocks.0.' in dropped
  new = next(line for line in log.splitlines() if 'new, not in the file' in line)
  for name in ('head.weight', 'head.bias', 'fc_norm.bias', 'relative_position_bias_table'):
    assert name in new
  rows = metrics(workdir)
  assert [row['step'] for row in rows if 'eval/top1' in row] == [0, 1, 2, 3, 4]
  assert _accuracies(rows[0]) == _accuracies(rows[0], 'ema_')
  assert rows[-1]['eval/loss'] != rows[-1]['eval/ema_loss']
  for key in ('top1', 'top5'):  # shares of 35 examples
    assert (35 * rows[-1][f'eval/{key}']) == pytest.approx(round(35 * rows[-1][f'eval/{key}']))
  assert 'hivit_jax.tools.predict --workdir=' in log
  assert load_metadata(workdir)['class_names'] == list('0123456789')


def test_an_interrupted_finetuning_ends_as_an_uninterrupted_one(
  runs, finished, finetuned, tmp_path
):
  _finetune(runs, finished.workdir, tmp_path / 'run', steps=2)
  _finetune(runs, tmp_path / 'gone', tmp_path / 'run')  # what it began with is not needed any more
  assert metrics(tmp_path / 'run')[-1] == metrics(finetuned[0])[-1]
  for key in ('params', 'ema', 'opt_state'):
    one, two = (load_params(w, key=key).state for w in (tmp_path / 'run', finetuned[0]))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_evaluation_counts_every_example_once_on_any_number_of_devices(runs, finetuned, tmp_path):
  workdir, _ = finetuned
  expected = _accuracies(metrics(workdir)[-1])
  found = {1: 8, 3: 15}
  for devices, batch_size in found.items():
    result = _evaluate(
      runs, f'--workdir={workdir}', devices=devices, **{'evaluation.batch_size': batch_size}
    )
    assert _accuracies(result) == pytest.approx(expected, rel=1e-5)
  further = {'evaluation.more': 'again=test[:35],few=test[:2]@digits'}
  average = _evaluate(runs, init=workdir / 'checkpoints' / '4', init_ema=True, **further)
  assert _accuracies(average) == pytest.approx(_accuracies(metrics(workdir)[-1], 'ema_'), rel=1e-5)
  for key in ('top1', 'top5', 'loss'):
    assert average[f'eval_again/{key}'] == average[f'eval/{key}']
  assert average['eval_few/top1'] in (0, 0.5, 1)


def test_two_processes_evaluate_as_one(runs, finetuned):
  """Each reads its share of the examples; the first one prints."""
  settings = {'evaluation.batch_size': 8}
  command = _command('evaluate.py', '--mode=evaluate', f'--workdir={finetuned[0]}', **settings)
  with runs.job(command, found_by='mpi', devices=1) as job:
    assert [process.wait() for process in job] == [0, 0], [process.output() for process in job]
    first, second = (process.output() for process in job)
  (line,) = [line for line in first.splitlines() if line.startswith('{')]
  assert _accuracies(json.loads(line)) == pytest.approx(
    _accuracies(metrics(finetuned[0])[-1]), rel=1e-5
  )
  assert '{' not in second


def test_imported_weights_are_evaluated_as_the_checkpoint_they_came_from(runs, finetuned, tmp_path):
  workdir, _ = finetuned
  file = tmp_path / 'weights.safetensors'
  command = [sys.executable, '-m', 'hivit_jax.tools.convert', 'to-torch', str(workdir)]
  done = runs.finish([*command, f'--out={file}', '--layout=official'])
  assert done.returncode == 0, done.stderr
  result = _evaluate(runs, init=file, **DATA)  # the file knows the size, but not the data
  assert _accuracies(result) == pytest.approx(_accuracies(metrics(workdir)[-1]), rel=1e-5)


@pytest.mark.parametrize('config', ['evaluate.py', 'finetune_hivit_t.py', 'evaluate.py:knn'])
def test_a_run_is_evaluated_as_it_evaluated_itself(runs, finetuned, finished, config):
  """Whatever the named config says of size, data, crop or model; exactly, with its batch size."""
  workdir, _ = finetuned
  if config == 'evaluate.py:knn':
    result = _evaluate(runs, f'--workdir={workdir}', config=config)
    assert result.keys() == {'eval/knn_top1'}
    return
  own = _accuracies(metrics(workdir)[-1])
  result = _evaluate(runs, f'--workdir={workdir}', config=config, **{'evaluation.batch_size': 8})
  assert result == {f'eval/{key}': value for key, value in own.items()}
  pretrained = _evaluate(runs, f'--workdir={finished.workdir}', config=config)
  last = [row for row in metrics(finished.workdir) if 'eval/knn_top1' in row][-1]
  assert pretrained == {'eval/knn_top1': last['eval/knn_top1']}


def test_a_probe_at_another_size_is_evaluated_as_it_evaluated_itself(runs, finished, tmp_path):
  settings = DATA | {
    'init': finished.workdir, 'image_size': 64, 'max_steps': 1, 'knn.every_epochs': 1,
    'data.eval_crop': 0.7, 'data.mean': '0.4,0.5,0.6',
  }  # fmt: skip
  done = _run(runs, 'linear_hivit_b.py:debug', f'--workdir={tmp_path / "run"}', **settings)
  assert done.returncode == 0, done.stderr
  result = _evaluate(runs, f'--workdir={tmp_path / "run"}', **{'evaluation.batch_size': 16})
  assert result.keys() == {'eval/top1', 'eval/top5', 'eval/loss', 'eval/knn_top1'}
  assert result.items() <= metrics(tmp_path / 'run')[-1].items()


def test_flags_win_over_the_run_and_the_log_says_which(runs, finetuned):
  done = _run(
    runs, 'evaluate.py', '--mode=evaluate', f'--workdir={finetuned[0]}',
    **{'data.eval_split': 'test[:20]', 'image_size': '64', 'data.name': 'digits'},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (line,) = [line for line in done.stderr.splitlines() if 'overridden on the command line' in line]
  assert line.endswith('data.eval_split: test[:35] -> test[:20]; image_size: (48, 32) -> (64, 64)')
  assert 'at 64x64 pixels on test[:20] of digits (20 examples)' in done.stderr


def test_k_nn_of_a_file(runs, finished, tmp_path):
  backbone = tmp_path / 'backbone.safetensors'
  command = [sys.executable, '-m', 'hivit_jax.tools.convert', 'to-torch', str(finished.workdir)]
  done = runs.finish([*command, f'--out={backbone}', '--layout=backbone'])
  assert done.returncode == 0, done.stderr
  settings = DATA | {
    'evaluation.batch_size': 16, 'knn.bank_size': 0, 'evaluation.more': 'again=test[:35]'
  }  # fmt: skip
  result = _evaluate(runs, config='evaluate.py:knn', init=backbone, **settings)
  assert result.keys() == {'eval/knn_top1', 'eval_again/knn_top1'}
  assert result['eval_again/knn_top1'] == result['eval/knn_top1']
  assert result['eval/knn_top1'] > 0.15  # chance is 0.1


def test_training_on_draws_the_head_anew_where_head_std_is_set(runs, finetuned, tmp_path):
  """As the official finetuning: its weight, though it fits; bias and norm are the file's."""
  workdir, _ = finetuned
  settings = SETTINGS | {
    'init': workdir, 'max_steps': 1, 'optim.lr': 0, 'image_size': 96, 'ema_decay': None,
    'knn.every_epochs': 1,
  }  # fmt: skip
  done = _run(runs, 'finetune_hivit_t.py:debug', f'--workdir={tmp_path / "run"}', **settings)
  assert done.returncode == 0, done.stderr
  line = 'drawn anew, not taken from the file: head.weight (config.model.head_std=2e-05)'
  assert line in done.stderr
  before, after = (load_params(path).state for path in (workdir, tmp_path / 'run'))
  np.testing.assert_array_equal(before['head']['bias'], after['head']['bias'])
  np.testing.assert_array_equal(before['fc_norm']['scale'], after['fc_norm']['scale'])
  assert np.abs(before['head']['kernel']).max() > 1e-3
  assert 0 < np.abs(after['head']['kernel']).max() < 2e-4
  evaluated = _evaluate(runs, f'--workdir={tmp_path / "run"}', **{'evaluation.batch_size': 8})
  assert evaluated.keys() == {'eval/top1', 'eval/top5', 'eval/loss', 'eval/knn_top1'}
  assert evaluated.items() <= metrics(tmp_path / 'run')[-1].items()


def test_a_linear_probe_of_the_pretrained_model(runs, finished, tmp_path):
  """Nothing but the head learns; enough to beat chance."""
  settings = DATA | {
    'init': finished.workdir, 'image_size': '32', 'max_steps': 40, 'batch_size': 32,
    'optim.name': 'adamw', 'optim.lr': 0.02, 'epochs': 20, 'optim.warmup_epochs': 0,
    'evaluation.every_epochs': 10,
    'evaluation.batch_size': 16, 'data.train_split': 'train', 'log_every_steps': 10,
  }  # fmt: skip
  done = _run(runs, 'linear_hivit_b.py:debug', f'--workdir={tmp_path / "run"}', **settings)
  assert done.returncode == 0, done.stderr
  rows = metrics(tmp_path / 'run')
  assert rows[-1]['eval/top1'] > 0.25
  evaluated = _evaluate(runs, f'--workdir={tmp_path / "run"}', **{'evaluation.batch_size': 16})
  assert evaluated == {f'eval/{key}': value for key, value in _accuracies(rows[-1]).items()}
  before, after = load_params(finished.workdir).state, load_params(tmp_path / 'run').state
  jax.tree.map(np.testing.assert_array_equal, before['blocks'][0], after['blocks'][0])


# --- mistakes


def _error(done) -> str:
  assert done.returncode == 2, done.stderr
  return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'model.num_classes': 4}, 'config.model.num_classes=4, but digits (train[:64]) has 10'),
    ({'init': '/nowhere'}, '/nowhere does not exist; give a .pth or .safetensors file'),
    ({'optim.name': 'sgd'}, 'config.optim.name="sgd" is unknown; there are: adamw, lars'),
    (
      {'model.name': 'mae_hivit_tiny'},
      'is no classifier, which config.task="classify" needs; try --config.model.name=hivit_tiny',
    ),
    ({'augment.rand_augment': 'rand-x'}, 'rand-x'),
    ({'augment.mixup': -1}, 'config.augment.mixup=-1.0: expected 0 or more'),
    (
      {'optim.warmup_epochs': 9.0, 'epochs': 9},
      'warmup_epochs=9.0 is not shorter than config.epoc',
    ),
    ({'augment.mix_group': -1}, 'config.augment.mix_group=-1: expected 0 or more'),
    (
      {'optim.layer_decay_of': 'all'},
      'config.optim.layer_decay_of=all: expected one of rate, peak',
    ),
    ({'augment.interpolation': 'box'}, 'interpolation=box: expected one of bicubic, bilinear'),
    (
      {'optim.milestones': '5,3'},
      'config.optim.milestones=(5, 3): expected epochs in rising order, such as (700,)',
    ),
    ({'optim.schedule': 'step'}, 'config.optim.milestones=(): config.optim.schedule=step takes'),
    ({'optim.layer_decay': 0}, 'config.optim.layer_decay=0.0: expected more than 0, at most 1'),
  ],
)
def test_mistakes(runs, tmp_path, settings, message):
  settings = SETTINGS | settings
  done = _run(runs, 'finetune_hivit_t.py:debug', f'--workdir={tmp_path / "run"}', **settings)
  assert message in _error(done)
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_evaluating_nothing(runs):
  done = _run(runs, 'evaluate.py', '--mode=evaluate')
  assert 'what to evaluate? Give --workdir=DIRECTORY or --config.init=FILE' in _error(done)


def test_evaluating_with_other_classes(runs, finetuned):
  done = _run(
    runs, 'evaluate.py', '--mode=evaluate', f'--workdir={finetuned[0]}',
    **{'data.name': 'photo_tiles', 'data.eval_split': 'test[:35]'},
  )  # fmt: skip
  assert 'photo_tiles (test[:35]) has other classes (16) than step 4 of ' in _error(done)


def test_evaluating_weights_of_other_classes_without_names(runs, tmp_path):
  model = nnx.merge(*random_model('hivit_tiny', num_classes=1000, **TINY))
  files.write(tmp_path / 'x.safetensors', exporter.state_dict(model))
  settings = DATA | {'image_size': 64, 'init': tmp_path / 'x.safetensors'}
  done = _run(runs, 'evaluate.py', '--mode=evaluate', **settings)
  message = 'x.safetensors has 1000 classes, without names, and digits (test[:35]) has 10: they can'
  assert message in _error(done)


def test_an_autoencoder_has_no_accuracy(runs, finished):
  done = _run(
    runs, 'evaluate.py', '--mode=evaluate', f'--workdir={finished.workdir}',
    **{'knn.every_epochs': 0},
  )  # fmt: skip
  assert 'evaluate its features with --config=configs/evaluate.py:knn' in _error(done)
