"""A task, model, data set and evaluator from outside the package: `tests/own`, as a user has them.

The task is dense: it crops images and label maps together, ignores pixels, and adds up a confusion
matrix; its model has BatchNorm inside.
"""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from hivit_jax.train import assemble, inputs
from hivit_jax.train.checkpoint import load_params
from tests.own import dense, dense_config
from tests.runs import metrics, on_devices

STEPS = 8
MEASURED = ('miou', 'pixels', 'brightness', 'images')


def _command(workdir, *arguments: str, config: str = 'tests/own/dense_config.py', **settings):
  flags = [f'--config.{key.replace("__", ".")}={value}' for key, value in settings.items()]
  return [
    sys.executable,
    'main.py',
    f'--config={config}',
    f'--workdir={workdir}',
    *arguments,
    *flags,
  ]


def _evaluate(runs, workdir, devices: int = 1, **settings) -> dict[str, float]:
  command = _command(workdir, '--mode=evaluate', **settings)
  done = runs.finish(command, on_devices(devices))
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def segmented(runs, tmp_path_factory):
  """The workdir of a finished run."""
  workdir = tmp_path_factory.mktemp('own') / 'run'
  done = runs.finish(_command(workdir))
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture(scope='module')
def task(runs, segmented):
  """The task with its transforms, as a run has it, and the evaluation examples."""
  del segmented  # the data are prepared
  config = dense_config.get_config()
  make = lambda train, **own: (inputs.train_transform if train else inputs.eval_transform)(  # noqa: E731
    config, **own
  )
  source = dense.Brightness('test[:35]', runs.environment['TFDS_DATA_DIR'])
  return assemble.task(config, make), source


def test_it_trains_and_every_labelled_pixel_is_measured_once(segmented, task):
  rows = metrics(segmented)
  first, last = rows[0], rows[-1]
  assert last['step'] == STEPS
  assert last['eval/miou'] > first['eval/miou'] + 0.2
  assert last['eval/ema_miou'] != last['eval/miou']
  assert last['train/pixel_accuracy'] > 0.5
  dense_task, source = task
  examples = [dense_task.input(train=False)(source[i]) for i in range(len(source))]
  labels = np.stack([example['segmentation'] for example in examples])
  known = (labels != dense.IGNORED).sum()
  assert known < labels.size
  assert last['eval/pixels'] == last['eval/ema_pixels'] == known
  means = [example['image'].mean() for example in examples]
  assert last['eval/images'] == 35
  assert last['eval/brightness'] == pytest.approx(np.average(means, weights=range(1, 36)))


def test_images_and_labels_are_cropped_together(task):
  dense_task, source = task
  for index in (8, 16):
    example = dense_task.input(train=True)(source[index], np.random.default_rng(index))
    assert example['image'].shape[:2] == example['segmentation'].shape == (32, 32)
    grey = np.asarray(Image.fromarray(example['image']).convert('L'))
    assert (dense.bright_or_dark(grey) == example['segmentation']).mean() > 0.8
  flipped = dense.bright_or_dark(grey[:, ::-1]) == example['segmentation']
  assert flipped.mean() < 0.8


def test_an_interrupted_run_ends_as_an_uninterrupted_one(runs, segmented, tmp_path):
  for steps in (3, STEPS):
    done = runs.finish(_command(tmp_path / 'run', max_steps=steps))
    assert done.returncode == 0, done.stderr
  assert metrics(tmp_path / 'run')[-1] == metrics(segmented)[-1]
  for key in ('params', 'ema', 'opt_state'):
    one, two = (load_params(w, key=key).state for w in (tmp_path / 'run', segmented))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_statistics_are_saved_averaged_and_no_business_of_the_optimizer(segmented):
  params, ema, moments = (
    load_params(segmented, key=key).state for key in ('params', 'ema', 'opt_state')
  )
  for name, start in (('mean', 0), ('var', 1)):
    assert np.abs(params['norm'][name] - start).max() > 0.05
    assert np.abs(params['norm'][name] - ema['norm'][name]).max() > 0
  text = str(jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), moments))
  assert 'scale' in text
  assert 'var' not in text


def test_a_run_is_evaluated_as_it_evaluated_itself_and_on_further_sets(runs, segmented):
  last = metrics(segmented)[-1]
  own = {f'eval/{key}': last[f'eval/{key}'] for key in MEASURED}
  further = 'again=test[:35],tail=test[20:35],seen=train[:16]@tests.own.dense:Brightness'
  found = _evaluate(runs, segmented, evaluation__more=further)
  assert {key: found[key] for key in own} == own
  assert (found['eval_again/miou'], found['eval_again/pixels']) == (
    own['eval/miou'],
    own['eval/pixels'],
  )
  assert found['eval_tail/pixels'] < own['eval/pixels']
  assert found['eval_seen/miou'] not in (own['eval/miou'], found['eval_tail/miou'])
  other = _evaluate(runs, segmented, devices=3, evaluation__batch_size=15)
  assert other == pytest.approx(own, rel=1e-5)


def test_two_processes_evaluate_as_one(runs, segmented):
  command = _command(segmented, '--mode=evaluate', config='configs/evaluate.py')
  command.append('--config.evaluation.batch_size=16')
  with runs.job(command, devices=1) as job:
    assert [process.wait() for process in job] == [0, 0], [process.output() for process in job]
    lines = job[0].output().splitlines()
  (line,) = [line for line in lines if line.startswith('{')]
  last = metrics(segmented)[-1]
  assert json.loads(line) == pytest.approx(
    {f'eval/{key}': last[f'eval/{key}'] for key in MEASURED}, rel=1e-5
  )


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'task': 'tests.own.dense:Nothing'}, r'has no Nothing'),
    ({'task': 'tests.own.dense:Brightness'}, 'is no dataclass that inherits from tasks.Task'),
    (
      {'model__name': 'hivit_tiny'},
      'is not a dense model, which config.task="tests.own.dense:DenseTask" needs',
    ),
    ({'task': 'mae'}, 'is not a masked autoencoder, which config.task="mae" needs; try'),
    (
      {'model__depth': 3},
      'model.depth=3: tests.own.dense:DenseModel has no argument "depth"; it takes: channels',
    ),
    ({'evaluators': 'tests.own.dense:IGNORED'}, 'to an Evaluator, see'),
    ({'evaluators': 'confusion'}, 'expected names such as package.module:Name'),
    ({'evaluation__more': 'tail=a,tail=b'}, 'a name comes twice at "tail=b"'),
    ({'evaluation__more': 'tail'}, 'expected NAME=SPLIT or NAME=SPLIT@DATA at "tail"'),
  ],
)
def test_mistakes(runs, tmp_path, settings, message):
  done = runs.finish(_command(tmp_path / 'run', **settings))
  assert done.returncode == 2, done.stderr
  assert message in done.stderr.splitlines()[-1]
  assert not (tmp_path / 'run' / 'config.json').exists()
