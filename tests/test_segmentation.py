"""Segmentation from the command line: it trains, resumes, and is measured alike by all devices."""

import json

import jax
import numpy as np
import pytest

from hivit_jax.train.checkpoint import load_params
from tests.dense_runs import LONG, STEPS, assert_same_after_a_kill, command_line, finished
from tests.runs import metrics, on_devices

CONFIG = 'configs/segment_hivit_t.py:debug'
MEASURED = ('miou', 'macc', 'aacc')
VIEWS = 'slide 64x64, stride 43x43, scale 1'


def _command(workdir, *arguments: str, config: str = CONFIG, **settings) -> list[str]:
  return command_line(config, workdir, *arguments, **settings)


@pytest.fixture(scope='module')
def trained(runs, tmp_path_factory):
  """The workdir of a finished run."""
  workdir = tmp_path_factory.mktemp('segment') / 'run'
  return finished(runs, _command(workdir, **LONG), workdir)


def test_it_leaves_metrics_tables_and_pictures(trained):
  last = metrics(trained)[-1]
  for name in MEASURED:
    assert 0 <= last[f'eval/{name}'] <= 1
    assert last[f'eval/ema_{name}'] >= 0
  found = json.loads((trained / 'eval_classes' / f'step_{STEPS:08}.json').read_text())
  assert found['miou'] == last['eval/miou']
  assert len(found['classes']) == 16
  assert sum(row['share'] for row in found['classes']) == pytest.approx(1, abs=1e-3)
  table = (trained / 'eval_classes' / f'step_{STEPS:08}.txt').read_text()
  assert table.splitlines()[-1].startswith(f'mIoU {100 * last["eval/miou"]:.2f}')
  assert found['views'] == VIEWS
  assert table.endswith(f' ({VIEWS})\n')
  for name in ('segmentations', 'eval_confusion'):
    assert (trained / name / f'step_{STEPS:08}.png').exists()


def test_killed_in_a_save_it_ends_with_the_same_bits(runs, trained, tmp_path):
  workdir = tmp_path / 'run'
  assert_same_after_a_kill(runs, _command(workdir, **LONG), workdir, trained)


def test_running_statistics_move_and_have_no_optimizer(trained):
  params, moments = (load_params(trained, key=key).state for key in ('params', 'opt_state'))
  norm = params['decode_head']['fpn_bottleneck']['bn']
  assert np.abs(norm['mean']).max() > 0
  assert np.abs(np.asarray(norm['var']) - 1).max() > 1e-3
  text = str(jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), moments))
  assert "'bn']['scale']" in text
  assert "'bn']['var']" not in text


def test_a_linear_classifier_leaves_the_encoder_alone(runs, trained, tmp_path):
  """It starts from the encoder of another segmenter, and its checkpoint brings its levels along."""
  settings = {'task': 'segment_linear', 'model__linear_levels': '(1,3)', 'init': trained}
  done = runs.finish(_command(tmp_path / 'run', **settings))
  assert done.returncode == 0, done.stderr
  before, after = (load_params(workdir).state for workdir in (trained, tmp_path / 'run'))
  jax.tree.map(np.testing.assert_array_equal, after['backbone'], before['backbone'])
  head = after['decode_head']
  assert set(head) == {'norm1', 'norm3', 'conv_seg'}
  assert head['conv_seg']['kernel'].shape == (1, 1, 8 + 32, 16)
  assert np.abs(head['norm3']['mean']).max() > 0
  moments = load_params(tmp_path / 'run', key='opt_state').state
  assert len(jax.tree.leaves(moments)) == 2 * 2 + 1  # of a kernel and a bias, and their count
  last = metrics(tmp_path / 'run')[-1]
  command = _command(tmp_path / 'run', '--mode=evaluate', config='configs/evaluate.py')
  done = runs.finish(command)
  assert done.returncode == 0, done.stderr
  own = {f'eval/{name}': last[f'eval/{name}'] for name in MEASURED}
  assert json.loads(done.stdout.splitlines()[-1]) == own


def test_neighbours_segment_by_the_features_of_pretraining(runs, tmp_path):
  scenes = {'data__name': 'photo_scenes', 'data__train_split': 'train[:32]'}
  scenes |= {'data__eval_split': 'test[:8]', 'knn__every_epochs': 1, 'pictures__every_epochs': 0}
  command = _command(tmp_path / 'run', config='configs/demo.py:debug', **scenes)
  done = runs.finish(command)
  assert done.returncode == 0, done.stderr
  last = metrics(tmp_path / 'run')[-1]['eval/knn_miou']
  assert last > 2 / 16**2  # a constant answer has about a sixteenth of a sixteenth
  done = runs.finish(
    _command(tmp_path / 'run', '--mode=evaluate', config='configs/evaluate.py:knn')
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1]) == {'eval/knn_miou': last}


def test_any_devices_and_processes_measure_the_same(runs, trained):
  last = metrics(trained)[-1]
  own = {f'eval/{name}': last[f'eval/{name}'] for name in MEASURED}
  command = _command(
    trained, '--mode=evaluate', config='configs/evaluate.py', evaluation__batch_size=6
  )
  done = runs.finish(command, on_devices(3))
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(own, rel=1e-5)
  assert 'mIoU' in done.stderr  # the table
  assert f' at {VIEWS} on test[:8] of photo_scenes (8 examples): ' in done.stderr
  with runs.job(command, devices=1) as job:
    assert [process.wait() for process in job] == [0, 0], [process.output() for process in job]
    lines = job[0].output().splitlines()
  (line,) = [line for line in lines if line.startswith('{')]
  assert json.loads(line) == pytest.approx(own, rel=1e-5)


def test_two_processes_train_as_one(runs, trained, tmp_path):
  """Eight devices that share parameters and BatchNorm's statistics; later, rounding adds up."""
  workdir = tmp_path / 'run'
  command = _command(workdir, **LONG | {'max_steps': 2, 'ema_decay': None}, mesh__fsdp=2)
  with runs.job(command, devices=4) as job:
    assert [process.wait() for process in job] == [0, 0], [process.output() for process in job]
    assert 'float32 on 8 x cpu' in job[0].output()
  for ours, expected in zip(metrics(workdir), metrics(trained)[:3], strict=True):
    keys = [key for key in expected if '/ema_' not in key]
    assert [ours[key] for key in keys] == pytest.approx([expected[k] for k in keys], rel=1e-5)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'accumulate_steps': 2}, 'config.accumulate_steps=2: config.task=segment computes a batch'),
    ({'segment__stride': '99,99'}, 'stride=(99, 99): expected (rows, columns) from 1 to the crop'),
    ({'model__num_classes': 5}, 'config.model.num_classes=5, but photo_scenes (train[:32]) has 16'),
    ({'evaluation__more': 'd=test[:4]@digits'}, 'digits (test[:4]) has other classes (10) than'),
    ({'model__linear_levels': '(3,5)'}, 'config.model.linear_levels=(3, 5): expected some of 1, 2'),
    (
      {'task': 'segment_linear'},
      'task=segment_linear needs config.model.linear_levels, such as (1',
    ),
    ({'model__name': 'hivit_tiny'}, 'is not a segmenter, which config.task="segment" needs'),
  ],
)
def test_mistakes(runs, tmp_path, settings, message):
  done = runs.finish(_command(tmp_path / 'run', **settings))
  assert done.returncode == 2, done.stderr
  assert message in done.stderr.splitlines()[-1]
  assert not (tmp_path / 'run' / 'config.json').exists()
