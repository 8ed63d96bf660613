"""The best checkpoint: which it is, that it stays, and that a killed run knows it."""

import json
import math
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hivit_jax.errors import UserError
from hivit_jax.tasks.evaluators import Evaluator
from hivit_jax.train import manifest, weights
from hivit_jax.train.best import KeepBest, warn_of_change
from hivit_jax.train.checkpoint import Checkpoints, load_metadata, load_params
from tests.runs import error_of, metrics
from tests.train.test_loop import Run

TOP1 = 'eval/top1'


def state(step: int) -> dict:
  return {'params': {'w': jnp.full(3, step, jnp.float32)}}


def go(workdir, values: dict[int, float], wanted: str = f'{TOP1}:max', keep_last: int = 1) -> None:
  """A run that saves at each of some steps, from where the one before it ended."""
  with Checkpoints(workdir / 'checkpoints', keep_last=keep_last) as checkpoints:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
    checkpoints.restore(abstract)
    keep = KeepBest(wanted, checkpoints)
    for step, value in values.items():
      keep.improved(step, {TOP1: value}, complete=True)
      checkpoints.save(step, state(step), {})


def there(workdir) -> list[int]:
  return manifest.steps(workdir / 'checkpoints')


def best(workdir) -> int:
  step = load_params(workdir / 'best').step
  assert load_params(workdir / 'best').state['w'][0] == step
  return step


@pytest.mark.parametrize(
  ('wanted', 'values', 'expected'),
  [
    ('eval/top1:max', (0.5, 0.7, 0.6, 0.7, 0.1), 2),  # the earlier of two equal ones
    ('eval/top1:min', (0.5, 0.7, 0.1, 0.1, 0.2), 3),
    ('eval/top1:max', (math.nan, 0.1, math.nan, 0.1, math.inf), 2),
    ('eval/top1:min', (-math.inf, -0.1, math.nan, 0.0, -0.1), 2),
  ],
)
def test_the_best_stays_beside_the_newest_and_has_a_name(tmp_path, wanted, values, expected):
  go(tmp_path, dict(enumerate(values, 1)), wanted)
  assert best(tmp_path) == expected
  assert there(tmp_path) == [expected, 5]


def test_a_continued_run_knows_the_best_to_the_last_bit(tmp_path):
  value = 0.1 + 0.2
  go(tmp_path, {1: value, 2: 0.1})
  go(tmp_path, {3: value})
  assert best(tmp_path) == 1
  go(tmp_path, {4: np.nextafter(value, 1.0)})
  assert best(tmp_path) == 4
  assert there(tmp_path) == [4]


def test_the_old_best_is_removed_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
  go(tmp_path, {1: 0.5, 2: 0.1})
  monkeypatch.setattr(shutil, 'rmtree', lambda *_, **__: None)  # a kill before they are removed
  go(tmp_path, {3: 0.6})
  assert (best(tmp_path), there(tmp_path)) == (3, [1, 2, 3])
  monkeypatch.undo()
  go(tmp_path, {4: 0.2})
  assert (best(tmp_path), there(tmp_path)) == (3, [3, 4])


def test_another_metric_begins_anew(tmp_path):
  go(tmp_path, {1: 0.5, 2: 0.1})
  go(tmp_path, {3: 0.3}, f'{TOP1}:min')
  assert (best(tmp_path), there(tmp_path)) == (3, [3])


def test_a_best_that_somebody_removed_is_not_waited_for(tmp_path):
  go(tmp_path, {1: 0.5, 2: 0.1})
  shutil.rmtree(tmp_path / 'checkpoints/1')
  with pytest.raises(UserError, match=r'best by eval/top1:max was .*/checkpoints/1, which is gone'):
    load_params(tmp_path / 'best')
  go(tmp_path, {3: 0.2})
  assert best(tmp_path) == 3


def test_after_going_back_behind_the_best_there_is_a_new_one(tmp_path):
  go(tmp_path, {1: 0.1, 2: 0.5}, keep_last=2)
  next((tmp_path / 'checkpoints/2/state').rglob('d/*')).write_bytes(b'damaged')
  go(tmp_path, {3: 0.4})
  assert best(tmp_path) == 3


def test_a_damaged_best_is_told_and_has_no_substitute(tmp_path):
  go(tmp_path, {1: 0.5, 2: 0.1})
  next((tmp_path / 'checkpoints/1/state').rglob('d/*')).write_bytes(b'damaged')
  with pytest.raises(UserError, match=r'no usable checkpoint .*step 1: .*other checkpoints.*\[2\]'):
    load_params(tmp_path / 'best')


def test_a_run_that_keeps_no_best_says_how_to(tmp_path):
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(1, state(1), {})
  for read in (load_params, load_metadata, weights.read):
    with pytest.raises(UserError) as error:
      read(tmp_path / 'best')
    assert str(error.value) == (
      f'{tmp_path}/best: this run keeps no best checkpoint, which '
      f'--config.checkpoint.keep_best=eval/top1:max does; its newest is {tmp_path}'
    )


@pytest.mark.parametrize(
  ('wanted', 'known', 'finished', 'message'),
  [
    (None, None, True, None),
    (None, TOP1, False, 'no longer set: the best stays step 3 (eval/top1:max 0.5); later steps'),
    (f'{TOP1}:max', TOP1, True, None),
    (f'{TOP1}:max', None, False, None),  # it measures first
    (f'{TOP1}:max', None, True, f'keep_best={TOP1}:max comes too late: this run is finished'),
    ('eval/loss:min', TOP1, True, 'keep_best=eval/loss:min comes too late'),
  ],
)
def test_a_new_or_missing_setting_is_told(caplog, wanted, known, finished, message):
  warn_of_change(wanted, known and manifest.Best(f'{known}:max', 0.5, 3), finished=finished)
  assert len(caplog.records) == (message is not None)
  assert message is None or message in caplog.records[0].getMessage()


def test_without_the_setting_the_best_stays(tmp_path):
  go(tmp_path, {1: 0.5, 2: 0.1})
  with Checkpoints(tmp_path / 'checkpoints', keep_last=1) as checkpoints:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
    checkpoints.restore(abstract)
    checkpoints.save(3, state(3), {})
  assert (best(tmp_path), there(tmp_path)) == (1, [1, 3])


def test_a_workdir_may_be_called_best(tmp_path):
  go(tmp_path / 'best', {1: 0.5})
  assert load_params(tmp_path / 'best').step == 1
  assert load_params(tmp_path / 'best/best').step == 1


# In the loop


def measuring(values: dict[int, float], every: int = 2, name: str = TOP1) -> Evaluator:
  return Evaluator(every, lambda step, _: {name: values.get(step, 0.0)})


def trained(wanted: str, *evaluators: Evaluator, known: manifest.Best | None = None, **options):
  run = Run(evaluators=list(evaluators), save_every=100, **options)
  run.checkpoints.best = known
  run._options['keep_best'] = KeepBest(wanted, run.checkpoints)
  return run


def test_a_step_that_is_the_best_is_saved_whenever_it_is():
  run = trained(f'{TOP1}:max', measuring({0: 0.1, 4: 0.5, 6: 0.5, 8: 0.6}))
  run()
  assert list(run.checkpoints.saved) == [0, 4, 8, 10]
  assert run.checkpoints.best == (f'{TOP1}:max', 0.6, 8)


def test_metrics_of_other_steps_do_not_matter():
  run = trained(f'{TOP1}:max', measuring({4: 0.5}, every=4), measuring({}, 3, 'eval/knn_top1'))
  run()
  assert run.checkpoints.best == (f'{TOP1}:max', 0.5, 4)


def test_an_unknown_metric_is_told_before_training():
  run = trained('eval/top_1:max', measuring({}), measuring({}, 3, 'eval/knn_top1'))
  with pytest.raises(UserError) as error:
    run()
  assert str(error.value) == (
    'config.checkpoint.keep_best=eval/top_1:max: this run measures no eval/top_1; it measures '
    'eval/knn_top1, eval/top1'
  )
  assert not run.checkpoints.saved
  with pytest.raises(UserError, match='it measures nothing'):
    trained(f'{TOP1}:max')()


def test_a_run_that_did_not_ask_for_the_best_before_measures_first():
  run = trained(f'{TOP1}:max', measuring({5: 0.9}), start_step=5, evaluated=True)
  run()
  assert run.checkpoints.best == (f'{TOP1}:max', 0.9, 5)
  with pytest.raises(UserError, match='measures no eval/x'):
    trained('eval/x:max', measuring({}), start_step=5, evaluated=True)()


def test_a_run_that_knows_its_best_goes_on_from_it():
  known = manifest.Best(f'{TOP1}:max', 0.7, 2)
  steps = []
  run = trained(
    f'{TOP1}:max', Evaluator(2, lambda step, _: steps.append(step) or {TOP1: 0.1 * (step == 8)}),
    known=known, start_step=4, evaluated=True,
  )  # fmt: skip
  run()
  assert run.checkpoints.best == known
  assert steps == [6, 8, 10]
  assert list(run.checkpoints.saved) == [10]


# Real runs

COMMAND = [sys.executable, 'main.py', '--config=configs/finetune_hivit_t.py:debug']
SETTINGS = {
  'max_steps': 14,
  'optim.lr': 0.05,
  'data.eval_split': 'test[:48]',
  'evaluation.every_epochs': 0.5,
  'checkpoint.every_epochs': 100,
  'checkpoint.keep_last': 1,
  'checkpoint.keep_best': f'{TOP1}:max',
}


def command(workdir, **settings) -> list[str]:
  flags = [f'--config.{key}={value}' for key, value in (SETTINGS | settings).items()]
  return [*COMMAND, f'--workdir={workdir}', *flags]


def test_a_killed_run_ends_with_its_best_and_everything_reads_it(runs, tmp_path):
  workdir = tmp_path / 'run'
  with runs.start(command(workdir)) as process:  # while a better one than that of step 0 is saved
    process.wait_until(
      lambda: any((workdir / 'checkpoints').glob('[!0]*.writing*')), 'a better one being saved'
    )
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  done = runs.finish(command(workdir))
  assert done.returncode == 0, done.stderr
  values = {row['step']: row[TOP1] for row in metrics(workdir) if TOP1 in row}
  step = max(values, key=lambda step: (values[step], -step))
  assert len(values) == 8
  record = manifest.read_verified(workdir / 'checkpoints/14')
  assert record.best == (f'{TOP1}:max', values[step], step)
  assert there(workdir) == sorted({step, 14})

  assert weights.read(workdir / 'best').source == f'step {step} of {workdir}/best'  # for init
  given = f'--workdir={workdir}/best'
  ended = runs.forks('main.py', '--config=configs/evaluate.py', '--mode=evaluate', given)
  assert ended.status == 0, ended.stderr
  assert json.loads(ended.stdout.splitlines()[-1])[TOP1] == pytest.approx(values[step])
  picture = tmp_path / 'a.png'
  Image.new('RGB', (32, 32)).save(picture)
  ended = runs.forks('-m', 'hivit_jax.tools.predict', given, '--json', str(picture))
  assert ended.status == 0, ended.stderr
  assert 'a.png' in json.dumps(json.loads(ended.stdout))


def test_a_finished_run_says_that_the_setting_comes_too_late(runs, finished, tmp_path):
  workdir = shutil.copytree(finished.workdir, tmp_path / 'run')
  done = runs.train(workdir, checkpoint__keep_best='eval/knn_top1:max')
  assert done.returncode == 0, done.stderr
  assert 'config.checkpoint.keep_best=eval/knn_top1:max comes too late' in done.stderr


def test_a_name_without_a_direction_is_one_line(forks, tmp_path):
  flags = command(tmp_path / 'run', **{'checkpoint.keep_best': TOP1})[1:]
  assert error_of(forks(*flags)) == (
    f'config.checkpoint.keep_best={TOP1}: expected METRIC:max or METRIC:min, such as eval/top1:max'
  )
