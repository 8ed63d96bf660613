"""The training loop with a model of one number, whose every step and delay the tests decide."""

import os
import queue
import signal
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.errors import Stopped
from hivit_jax.runtime.signals import StopSignals
from hivit_jax.tasks.evaluators import Evaluator
from hivit_jax.train import loop, sharding

BATCH = 4


def add_batch(state, batch):
  """A step that adds the batch's number to the parameter; the loss is that number."""
  number = batch['image'].mean()
  metrics = dict.fromkeys(('loss', 'grad_norm', 'param_norm', 'learning_rate'), number)
  return {'params': state['params'] + number}, metrics


def before_step(action, at=lambda step: True):
  """`add_batch` that does something first, at some steps."""

  def step(state, batch):
    if at(batch['image'][0, 0]):
      action()
    return add_batch(state, batch)

  return step


class Clock:
  """Takes the place of `time`: nothing but sleeping takes time, however busy the machine is."""

  def __init__(self):
    self._now = 0.0

  def perf_counter(self) -> float:
    return self._now

  def sleep(self, seconds: float) -> None:
    self._now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
  clock = Clock()
  monkeypatch.setattr(loop, 'time', clock)
  return clock


class Batches:
  """The batch of step s is full of the number s."""

  def __init__(self, start: int, wait=lambda step: None):
    self._step, self._wait = start, wait
    self.broken: dict[int, str] = {}

  def __next__(self):
    self._step += 1
    self._wait(self._step)
    return {'image': np.full((BATCH, 1), self._step, np.float32)}


class Writer:
  def __init__(self):
    self.rows: dict[int, dict] = {}

  def write(self, step, metrics):
    self.rows.setdefault(step, {}).update(metrics)

  def column(self, name):
    return {step: row[name] for step, row in self.rows.items() if name in row}


class Progress:
  def __init__(self):
    self.shown = []

  def update(self, step, metrics):
    self.shown.append((step, list(metrics)))


class Checkpoints:
  def __init__(self, on_save):
    self.saved: dict[int, tuple[float, dict]] = {}
    self._on_save = on_save

  def save(self, step, state, metadata, *, wait):
    self._on_save()
    self.saved[step] = float(state['params']), metadata

  def wait(self):
    pass

  def latest_step(self):
    return max(self.saved, default=None)

  def path(self, step):
    return f'checkpoints/{step}'


class Run:
  """`loop.train` and what it was given."""

  def __init__(self, step=add_batch, *, wait=lambda step: None, on_save=lambda: None, **options):
    start = options.get('start_step', 0)
    self.writer, self.progress = Writer(), Progress()
    self.checkpoints = Checkpoints(on_save)
    self.batches = Batches(start, wait)
    self._options = {
      'state': {'params': jnp.asarray(start * (start + 1) / 2)},
      'train_step': step,
      'batches': self.batches,
      'mesh': sharding.make_mesh(1),
      'start_step': 0,
      'total_steps': 10,
      'batch_size': BATCH,
      'epochs_per_step': 0.25,
      'evaluators': [],
      'evaluated': False,
      'checkpoints': self.checkpoints,
      'metadata': {'config': 'c'},
      'save_every': 5,
      'writer': self.writer,
      'progress': self.progress,
      'log_every': 3,
    } | options

  def __call__(self):
    before = _handlers()
    try:
      with StopSignals() as signals:
        return loop.train(loop.Run(**self._options), signals)
    finally:
      assert _handlers() == before


def _handlers():
  return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


# Steps and metrics


def test_every_batch_is_used_once():
  assert Run()()['params'] == sum(range(1, 11))


def test_a_row_is_the_mean_of_the_steps_since_the_row_before():
  run = Run()
  run()
  # Rows at multiples of 3, and at 5 and 10, where a checkpoint looks at the metrics first.
  assert run.writer.column('train/loss') == {3: 2, 5: 4.5, 6: 6, 9: 8, 10: 10}
  assert run.writer.column('train/learning_rate') == {3: 3, 5: 5, 6: 6, 9: 9, 10: 10}
  assert run.writer.column('train/epoch') == {3: 0.75, 5: 1.25, 6: 1.5, 9: 2.25, 10: 2.5}


def test_metrics_are_fetched_one_interval_late_so_that_the_device_need_not_wait():
  rows_at = {}

  def step(state, batch):
    rows_at[int(batch['image'][0, 0])] = list(run.writer.rows)
    return add_batch(state, batch)

  run = Run(step, save_every=None)
  run()
  assert [rows_at[s] for s in (6, 7, 9, 10)] == [[], [3], [3], [3, 6]]
  assert list(run.writer.rows) == [3, 6, 9, 10]


def test_images_per_second_leave_out_compiling_evaluating_and_saving(clock):
  compiling = before_step(lambda: clock.sleep(0.5), at=lambda step: step == 1)
  run = Run(
    lambda state, batch: before_step(lambda: clock.sleep(0.02))(compiling(state, batch)[0], batch),
    evaluators=[Evaluator(4, lambda step, params: clock.sleep(0.5))],
    on_save=lambda: clock.sleep(0.5),
    total_steps=12,
    save_every=6,
    log_every=4,
  )
  run()
  rates = run.writer.column('train/images_per_second')
  assert rates == pytest.approx(dict.fromkeys((4, 6, 8, 12), BATCH / 0.02))


def test_the_first_step_alone_which_compiles_has_no_rate():
  run = Run(log_every=1, total_steps=2)
  run()
  assert list(run.writer.column('train/images_per_second')) == [2]
  assert run.progress.shown == [(1, ['loss']), (2, ['loss', 'images/s'])]


def test_the_share_of_the_time_that_data_is_waited_for(clock):
  run = Run(
    before_step(lambda: clock.sleep(0.03)), wait=lambda step: clock.sleep(0.01), save_every=None
  )
  run()
  shares = run.writer.column('train/data_wait_fraction')
  assert shares == pytest.approx(dict.fromkeys((3, 6, 9, 10), 0.25))


@pytest.mark.parametrize(('seconds', 'told'), [(5, True), (1, False)])
def test_when_devices_wait_for_data_for_a_minute_a_line_tells_once_what_helps(
  clock, caplog, seconds, told
):
  run = Run(
    before_step(lambda: clock.sleep(5)),
    wait=lambda step: clock.sleep(seconds if step != 1 else 0) if seconds > 1 else None,
    total_steps=30,
    save_every=None,
    for_data='more cores',
  )
  run()
  lines = [text for text in caplog.messages if 'wait for data' in text]
  assert lines == ['the devices wait for data 50 % of the time: more cores'] * told


def test_broken_images_are_a_metric_once_there_are_any():
  run = Run(
    wait=lambda step: run.batches.broken.update({7: 'a.jpg'}) if step == 8 else None,
    save_every=None,
  )
  run()
  assert run.writer.column('train/broken_images') == {9: 1, 10: 1}


# Evaluators and checkpoints


def test_evaluators_run_at_the_start_at_their_steps_and_at_the_end():
  seen = []

  def evaluate(step, state):
    seen.append((step, float(state['params'])))
    return {'eval/x': step}

  run = Run(evaluators=[Evaluator(4, evaluate)])
  run()
  assert seen == [(0, 0), (4, 10), (8, 36), (10, 55)]
  assert run.writer.column('eval/x') == {0: 0, 4: 4, 8: 8, 10: 10}


@pytest.mark.parametrize(('evaluated', 'steps'), [(True, [8, 10]), (False, [4, 8, 10])])
def test_a_continued_run_repeats_the_evaluators_of_its_start_only_if_they_were_not_done(
  evaluated, steps
):
  seen = []
  evaluator = Evaluator(4, lambda step, params: seen.append(step))
  Run(evaluators=[evaluator], start_step=4, evaluated=evaluated)()
  assert seen == steps


def test_checkpoints_are_saved_at_their_steps_and_at_the_end_with_what_they_are():
  run = Run(save_every=4)
  run()
  saved = {step: total for step, (total, _) in run.checkpoints.saved.items()}
  assert saved == {4: 10, 8: 36, 10: 55}
  expected = {'config': 'c', 'step': 8, 'epoch': 2.0, 'evaluated': True}
  assert run.checkpoints.saved[8][1] == expected
  run = Run(save_every=None)
  run()
  assert list(run.checkpoints.saved) == [10]


# Not finite


@pytest.mark.parametrize('metric', ['loss', 'grad_norm', 'param_norm'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('bad', [1, 6, 8, 10])
def test_nothing_is_saved_or_evaluated_that_is_not_finite(metric, value, bad):
  def step(state, batch):
    state, metrics = add_batch(state, batch)
    spoilt = {metric: jnp.where(batch['image'][0, 0] == bad, value, 1.0)}
    return state, metrics | spoilt

  seen = []
  evaluators = [Evaluator(2, lambda step, params: seen.append(step))]
  run = Run(step, evaluators=evaluators, save_every=2)
  with pytest.raises(loop.NonFiniteLoss, match=f'at step {bad}: .*{metric} {value}') as error:
    run()
  good = (bad - 1) // 2 * 2
  assert run.checkpoints.latest_step() == (good or None)
  assert seen == list(range(0, bad, 2))
  last = f'the last good checkpoint is checkpoints/{good}' if good else 'no checkpoint was saved'
  assert last in str(error.value)


# Signals


def stop(number: signal.Signals = signal.SIGTERM):
  """Sends this process a signal, which it has received when this returns."""
  os.kill(os.getpid(), number)


def block():
  """Waits for ever, as for data that do not come, and is sent a signal meanwhile."""
  threading.Timer(0.2, stop).start()
  queue.Queue().get()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_step_stops_after_it_with_a_checkpoint(number):
  run = Run(before_step(lambda: stop(number), at=lambda step: step == 7))
  with pytest.raises(Stopped) as stopped:
    run()
  assert run.checkpoints.saved[7] == (
    28,
    {'config': 'c', 'step': 7, 'epoch': 1.75, 'evaluated': True},
  )
  assert str(stopped.value) == (
    f'{number.name}: stopped at step 7, saved checkpoints/7; the same command continues from there'
  )
  assert list(run.writer.rows) == [3, 5, 6, 7]


def test_a_signal_during_the_first_step_stops_after_it():
  with pytest.raises(Stopped, match='stopped at step 1,'):
    Run(before_step(stop))()


def test_a_signal_while_data_is_waited_for_is_honoured_at_once():
  run = Run(wait=lambda step: block() if step == 8 else None)
  with pytest.raises(Stopped, match='stopped at step 7,'):
    run()
  total, metadata = run.checkpoints.saved[7]
  assert total == 28
  assert metadata['evaluated']


@pytest.mark.parametrize('at', [0, 4])
def test_a_signal_interrupts_an_evaluation_which_the_continued_run_repeats(at):
  def evaluate(step, params):
    if step == at:
      block()
    return {'eval/x': step}

  first = Evaluator(4, lambda step, params: {'eval/first': step})
  run = Run(evaluators=[first, Evaluator(4, evaluate)])
  with pytest.raises(Stopped, match=f'stopped at step {at},'):
    run()
  total, metadata = run.checkpoints.saved[at]
  assert total == at * (at + 1) / 2
  assert not metadata['evaluated']
  assert at not in run.writer.column('eval/x')
  again = Run(evaluators=[Evaluator(4, lambda step, params: {'eval/x': step})], start_step=at)
  again()
  assert at in again.writer.column('eval/x')


def test_an_evaluation_that_was_interrupted_is_made_up_for_when_no_step_is_left():
  evaluator = Evaluator(4, lambda step, params: {'eval/x': step})
  run = Run(evaluators=[evaluator], start_step=10, evaluated=False)
  assert run()['params'] == 55
  assert run.writer.rows == {10: {'eval/x': 10}}


def test_a_signal_during_a_step_that_is_to_be_evaluated_leaves_that_to_the_continued_run():
  evaluator = Evaluator(4, lambda step, params: {})
  run = Run(before_step(stop, at=lambda step: step == 4), evaluators=[evaluator])
  with pytest.raises(Stopped, match='stopped at step 4,'):
    run()
  assert not run.checkpoints.saved[4][1]['evaluated']


def test_a_signal_at_the_very_end_lets_the_run_finish():
  def evaluate(step, params):
    if step == 10:
      stop()
    return {'eval/x': step}

  run = Run(evaluators=[Evaluator(100, evaluate)])
  assert run()['params'] == 55
  assert run.writer.column('eval/x') == {0: 0, 10: 10}
  assert run.checkpoints.saved[10][1]['evaluated']


def test_the_same_signal_passed_on_twice_still_saves():
  run = Run(before_step(lambda: (stop(), stop()), at=lambda step: step == 7))
  with pytest.raises(Stopped, match='stopped at step 7,'):
    run()
