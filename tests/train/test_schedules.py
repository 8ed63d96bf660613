"""The learning rate over a run; `tests/test_recipes.py` has that of each published recipe."""

import json

import jax
import numpy as np
import pytest

from configs import base, detect_hivit_b, segment_hivit_b, segment_vit_b
from hivit_jax.errors import UserError
from hivit_jax.interop import files
from hivit_jax.train import assemble, initialise, validate
from hivit_jax.train.schedules import Schedule
from tests.helpers import GOLDEN
from tests.runs import error_of, metrics

BASE = {'lr': 1.0, 'end_lr': 0.1, 'warmup_start_lr': 0.2, 'warmup': 2.0, 'length': 10.0}


def test_warmup_is_linear_then_half_a_cosine():
  schedule = Schedule(**BASE)
  actual = [schedule(e) for e in (0, 0.5, 1, 2, 4, 6, 8, 10)]
  cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * t)) / 2 for t in (0.25, 0.5, 0.75)]
  np.testing.assert_allclose(actual, [0.2, 0.4, 0.6, 1.0, *cosine, 0.1], rtol=1e-12)


def test_without_the_prefix_the_warmup_hides_the_cosines_beginning():
  schedule = Schedule(**BASE, warmup_prefix=False)
  warmup, cosine = Schedule(**BASE), Schedule(**BASE | {'warmup': 0.0})
  assert schedule(2.0) == cosine(2.0) < warmup(2.0) == 1.0
  before = np.nextafter(2.0, 0.0)  # the rate drops between two neighbouring numbers
  np.testing.assert_allclose(schedule(before), 1.0, rtol=1e-12)
  for epoch in (0.0, 1.0, before):
    assert schedule(epoch) == warmup(epoch)
  for epoch in (2.0, 2.5, 9.0, 10.0, 11.0):
    assert schedule(epoch) == cosine(epoch)


def test_steps():
  schedule = Schedule(**BASE, name='step', milestones=(4.0, 7.0), milestone_factor=0.5)
  epochs = [0.0, 1.0, 2.0, np.nextafter(4.0, 0.0), 4.0, 6.9, 7.0, 10.0, 20.0]
  expected = [0.2, 0.6, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]
  np.testing.assert_allclose([schedule(e) for e in epochs], expected, rtol=1e-12)
  np.testing.assert_allclose(schedule(np.array(epochs)), expected, rtol=1e-12)


@pytest.mark.parametrize('shape', [{}, {'warmup_prefix': False}, {'name': 'step'}])
def test_the_factor_of_a_layer(shape):
  whole = Schedule(**BASE, **shape)
  peak = Schedule(**BASE, **shape, scaled='peak')
  other = Schedule(**BASE | {'lr': 0.25}, **shape)
  for epoch in (0.0, 1.0, 2.0, 5.0, 10.0):
    np.testing.assert_allclose(whole(epoch, 0.25), 0.25 * whole(epoch), rtol=1e-12)
    np.testing.assert_allclose(peak(epoch, 0.25), other(epoch), rtol=1e-12)
    assert peak(epoch) == whole(epoch)
    for schedule in (whole, peak):  # what a step relies on
      lowest, highest = schedule(epoch, 0.0), schedule(epoch, 1.0)
      line = lowest + 0.25 * (highest - lowest)
      np.testing.assert_allclose(schedule(epoch, 0.25), line, rtol=1e-12)


def test_stays_at_the_end_rate():
  schedule = Schedule(**BASE)
  np.testing.assert_allclose([schedule(10.0), schedule(10.5), schedule(50.0)], 0.1, rtol=1e-12)


def test_no_warmup():
  schedule = Schedule(**BASE | {'warmup': 0.0})
  np.testing.assert_allclose([schedule(0.0), schedule(5.0), schedule(10.0)], [1.0, 0.55, 0.1])


def test_a_power_of_what_is_left_scaled_by_the_warmup():
  schedule = Schedule(**BASE, name='poly', power=2.0)
  curve = lambda time: 0.1 + 0.9 * (1 - time / 10) ** 2  # noqa: E731
  expected = [0.2, 0.6 * curve(1.0), curve(2.0), curve(5.0), 0.1, 0.1]
  actual = schedule(np.array([0.0, 1.0, 2.0, 5.0, 10.0, 11.0]))
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize('scaled', ['rate', 'peak'])
def test_the_factor_of_a_layer_in_a_power(scaled):
  schedule = Schedule(**BASE, name='poly', scaled=scaled)
  ends = 1.0 if scaled == 'peak' else 0.25  # layers share start and end, or share nothing
  times = np.array([0.0, 1.0, 2.0, 5.0, 10.0])
  whole, layer, none = (schedule(times, scale) for scale in (1.0, 0.25, 0.0))
  np.testing.assert_allclose(layer[[0, -1]], ends * whole[[0, -1]], rtol=1e-12)
  np.testing.assert_allclose(layer, none + 0.25 * (whole - none), rtol=1e-12)
  assert np.all(layer[1:-1] < whole[1:-1])


def official(file: str) -> dict:
  """What the authors' code says of a schedule."""
  return json.loads((GOLDEN / file).read_text())


def configured(**settings):
  config = base.get_config()
  config.update_from_flattened_dict({key.replace('__', '.'): v for key, v in settings.items()})
  validate.check(config)
  return config


def assert_equal_in_steps(schedule: Schedule, steps, rates, scale: float = 1.0) -> None:
  """Alone in double precision, and as a training step computes it."""
  steps = np.asarray(steps)
  np.testing.assert_allclose(schedule(steps, scale), rates, rtol=1e-9)
  compiled = jax.jit(schedule)(steps.astype(np.int32), scale)
  np.testing.assert_allclose(compiled, rates, rtol=3e-7)


@pytest.mark.parametrize(
  ('name', 'module', 'changes'),
  [
    ('official_80k', segment_hivit_b, {}),
    ('short', segment_hivit_b, {'steps': 1000, 'optim.warmup_steps': 100}),
    ('mae_160k', segment_vit_b, {}),
  ],
)
def test_poly_is_that_of_mmsegmentation(name, module, changes):
  """With the numbers of the recipes."""
  theirs, config = official('segmentation_lr_schedule.json')[name], module.get_config()
  config.update_from_flattened_dict(changes)
  assert config.steps == theirs['iterations']
  schedule = assemble.schedule(config, 123.0)  # the size of the data does not matter
  steps, rates = zip(*theirs['points'], strict=True)
  assert_equal_in_steps(schedule, steps, rates)
  _, lowest = zip(*theirs['points_of_layer_0'], strict=True)
  assert_equal_in_steps(schedule, steps, lowest, scale=lowest[-1] / rates[-1])


def test_step_is_that_of_mmdetection():
  """With the recipe's milestones in epochs, at exactly their step, and its warmup in steps."""
  theirs, config = official('detection_lr_schedule.json'), detect_hivit_b.get_config()
  assert config.epochs == theirs['epochs']
  schedule = assemble.schedule(config, 1 / theirs['steps_per_epoch'])
  steps, rates, lowest = zip(*theirs['points'], strict=True)
  assert_equal_in_steps(schedule, steps, rates)
  assert_equal_in_steps(schedule, steps, lowest, scale=config.optim.layer_decay**21)


@pytest.mark.parametrize('name', ['pretrain', 'finetune'])
def test_cosine_is_that_of_mae(name):
  theirs = official('lr_schedule.json')[name]
  settings = {'optim__lr': theirs['lr'], 'optim__end_lr': theirs['min_lr']}
  config = configured(
    epochs=float(theirs['epochs']), optim__warmup_epochs=float(theirs['warmup_epochs']), **settings
  )
  epochs, rates = zip(*theirs['points'], strict=True)
  np.testing.assert_allclose(assemble.schedule(config)(np.array(epochs)), rates, rtol=1e-9)
  per_epoch = 625
  in_steps = configured(
    steps=theirs['epochs'] * per_epoch,
    optim__warmup_steps=theirs['warmup_epochs'] * per_epoch,
    **settings,
  )
  steps = np.array(epochs) * per_epoch
  np.testing.assert_allclose(assemble.schedule(in_steps)(steps), rates, rtol=1e-9)
  for schedule in (assemble.schedule(in_steps), assemble.schedule(config, 1 / per_epoch)):
    compiled = jax.jit(schedule)(steps.astype(np.float32))
    np.testing.assert_allclose(compiled, rates, atol=1e-7 * theirs['lr'])


def test_milestones_are_in_the_unit_of_the_length():
  config = configured(
    steps=100, optim__schedule='step', optim__milestones=(70.0,), optim__warmup_steps=0
  )
  rates = assemble.schedule(config, 0.01)(np.array([69, 70]))
  np.testing.assert_allclose(rates, [1.6e-3, 1.6e-4], rtol=1e-12)


@pytest.mark.parametrize(
  ('settings', 'given', 'message'),
  [
    (
      {'steps': 100},
      {'epochs', 'steps'},
      '--config.epochs=300.0 and config.steps=100: one of them must go; to count in epochs: '
      '--config.steps=None',
    ),
    (
      {'optim__warmup_steps': 5},
      {'optim.warmup_epochs'},
      '--config.optim.warmup_epochs=40.0 and config.optim.warmup_steps=5: one of them must go',
    ),
    (
      {'steps': 100, 'optim__warmup_steps': 100},
      (),
      'config.optim.warmup_steps=100 is not shorter than config.steps=100: the learning rate would '
      'only rise; for a short run: --config.optim.warmup_steps=5',
    ),
    (
      {
        **{'steps': 100, 'optim__warmup_steps': 1},
        **{'optim__schedule': 'step', 'optim__milestones': (100.0,)},
      },
      (),
      'config.optim.milestones=(100.0,): config.optim.schedule=step takes steps before the end, '
      'config.steps=100; for a short run: --config.optim.milestones=87.5',
    ),
    ({'optim__power': 0.0}, (), 'config.optim.power=0.0: expected more than 0'),
  ],
)  # fmt: skip
def test_lengths_that_make_no_sense(settings, given, message):
  config = base.get_config()
  config.update_from_flattened_dict({key.replace('__', '.'): v for key, v in settings.items()})
  with pytest.raises(UserError) as error:
    validate.check(config, given)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ('settings', 'fits', 'message'),
  [
    (
      {'steps': 1000},
      0.1,
      'config.optim.warmup_epochs=40.0 is not shorter than config.steps=1000: the learning rate '
      'would only rise; for a short run: --config.optim.warmup_epochs=0.5',
    ),
    (
      {'optim__warmup_steps': 30_000},
      0.001,
      'config.optim.warmup_steps=30000 is not shorter than config.epochs=300.0: the learning rate '
      'would only rise; for a short run: --config.optim.warmup_steps=1500',
    ),
  ],
)
def test_lengths_in_epochs_and_steps_are_compared_when_the_data_is_known(settings, fits, message):
  config = configured(**settings)
  with pytest.raises(UserError) as error:
    validate.check_lengths(config, 0.01)
  assert message in str(error.value)
  validate.check_lengths(config, fits)


def test_a_run_of_so_many_steps(runs, tmp_path):
  """Four steps are an epoch, and the warmup of the tiny run is one epoch."""
  settings = {'max_steps': None, 'knn__every_epochs': 0, 'pictures__every_epochs': 0}
  settings |= {'log_every_steps': 1, 'optim__schedule': 'poly'}
  done = runs.train(tmp_path / 'run', steps=6, **settings)
  assert done.returncode == 0, done.stderr
  rates = [row['train/learning_rate'] for row in metrics(tmp_path / 'run')]
  expected = 1e-3 * np.array([0, 1, 2, 3, 4, 4]) / 4 * np.arange(6, 0, -1) / 6
  np.testing.assert_allclose(rates, expected, rtol=1e-6)
  error = error_of(runs.forks(*runs.command(tmp_path / 'other', steps=4, **settings)[1:]))
  assert error.startswith('config.optim.warmup_epochs=1.0 is not shorter than config.steps=4')
  assert not (tmp_path / 'other').exists()


def test_older_runs_have_another_name_for_steps():
  trained = configured(optim__schedule='step', optim__milestones=(200.0,)).to_dict()
  trained['optim']['schedule'] = 'multistep'
  state = files.StateDict({}, 'step 1 of it', {'config': trained})
  config = initialise.config_for(base.get_config(), state)
  assert config.optim.schedule == 'step'
  assert config.optim.milestones == (200.0,)
