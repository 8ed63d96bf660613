"""The training loop: the same for every task."""

import collections
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from hivit_jax.errors import Stopped, UserError
from hivit_jax.runtime import distributed, host_memory
from hivit_jax.runtime.signals import Interrupted, StopSignals
from hivit_jax.tasks.evaluators import Evaluator
from hivit_jax.train import sharding
from hivit_jax.train.best import KeepBest

_log = logging.getLogger(__name__)
_IN_FLIGHT = 2  # steps given to the device beyond the one it works on
_STARVED, _STARVED_SECONDS = 0.1, 60  # share of the time, and for how long, that is worth a line
_FINITE = ('loss', 'grad_norm', 'param_norm')  # metrics that tell whether a state is sound


class NonFiniteLoss(UserError):
  """Loss, gradient or parameters are NaN or infinite; no such state was saved."""


class _Interval:
  """Metrics of the steps since the last log line, and where their time went."""

  def __init__(self):
    self.steps: list[tuple[int, dict[str, jax.Array]]] = []
    self.broken = 0
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves the steps until now out of the timing."""
    self.untimed = len(self.steps)
    self.start = time.perf_counter()
    self.waited = 0.0  # seconds for data
    self.seconds = 0.0

  def stop(self, broken: int) -> None:
    """Ends it; `broken` images have been met until now."""
    self.seconds = time.perf_counter() - self.start
    self.broken = broken

  def timing(self, batch_size: int) -> dict[str, float]:
    timed = len(self.steps) - self.untimed
    if not timed:
      return {}
    return {
      'images_per_second': batch_size * timed / self.seconds,
      'data_wait_fraction': self.waited / self.seconds,
    }


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as the loop needs it.

  Attributes:
    state: of the model and optimizer at `start_step`; the loop donates it.
    train_step: see `step.make_train_step`.
    batches: this process's batches from `start_step` on, a `data.loader.Loader`.
    mesh: the devices.
    start_step, total_steps: steps done, and when to end.
    batch_size: examples a step over all processes, for images/s.
    epochs_per_step: for epochs in the log and in checkpoints.
    evaluators: see `Evaluator`.
    evaluated: the evaluators have run at `start_step`: `evaluated` of the checkpoint's metadata.
    checkpoints: see `checkpoint.Checkpoints`.
    keep_best: chooses the best of them; None: nobody does.
    metadata: saved with every checkpoint, and `step`, `epoch` and `evaluated` with it.
    save_every: steps between checkpoints, one more at the end; None: only that one.
    writer: has `write(step, metrics)`.
    progress: has `update(step, metrics)`.
    log_every: steps between log lines.
    for_data: what a user may do when the devices wait for data.
  """

  state: Any
  train_step: Callable
  batches: Any
  mesh: Mesh
  start_step: int
  total_steps: int
  batch_size: int
  epochs_per_step: float
  evaluators: Sequence[Evaluator]
  evaluated: bool
  checkpoints: Any
  metadata: Mapping[str, Any]
  save_every: int | None
  writer: Any
  progress: Any
  log_every: int
  keep_best: KeepBest | None = None
  for_data: str = ''


def train(run: Run, signals: StopSignals) -> Any:
  """Trains from `run.start_step` to `run.total_steps`.

  Metrics are fetched one interval late, so that the device never waits for the host. Evaluation
  and checkpoints look at them first: a state after a non-finite loss is never saved. The first
  step, which compiles, evaluations and saving count neither as images/s nor as time.

  A signal is honoured after the step under way, and at once while data is waited for or evaluators
  run; the last evaluators, at `total_steps`, are finished first. Several processes agree on a step
  soon after, and finish their evaluators.

  Args:
    run: what to train, on what, and where it goes.
    signals: an entered `StopSignals`.

  Returns:
    The final state.

  Raises:
    NonFiniteLoss: with the step, the last good checkpoint and what to try.
    Stopped: after SIGTERM or SIGINT, with a checkpoint saved.
  """
  state, batches, checkpoints, writer = run.state, run.batches, run.checkpoints, run.writer
  interval, late = _Interval(), None
  starved = 0.0  # seconds in a row, of log lines with much waiting
  vote = distributed.Votes(run.mesh)
  interruptible = contextlib.nullcontext if jax.process_count() > 1 else signals.interruptible

  def flush(done: _Interval | None) -> None:
    nonlocal starved
    if done is None or not done.steps:
      return
    values = jax.device_get([metrics for _, metrics in done.steps])
    for (step, _), metrics in zip(done.steps, values, strict=True):
      if not all(math.isfinite(metrics[key]) for key in _FINITE):
        raise _non_finite(step, metrics, checkpoints)
    step = done.steps[-1][0]
    means = {key: float(np.mean([metrics[key] for metrics in values])) for key in values[0]}
    means['learning_rate'] = float(values[-1]['learning_rate'])
    timing = done.timing(run.batch_size)
    means |= {**timing, **host_memory.in_use(), 'epoch': step * run.epochs_per_step}
    if done.broken:
      means['broken_images'] = done.broken
    waited = timing.get('data_wait_fraction', 0.0)
    before, starved = starved, starved + done.seconds if waited > _STARVED else 0.0
    if before < _STARVED_SECONDS <= starved:
      _log.warning('the devices wait for data %.0f %% of the time: %s', 100 * waited, run.for_data)
    writer.write(step, {f'train/{key}': value for key, value in means.items()})
    shown = {'loss': means['loss']}
    if timing:
      shown['images/s'] = timing['images_per_second']
    run.progress.update(step, shown)

  def flush_all() -> None:
    nonlocal interval, late
    if interval.steps:
      jax.block_until_ready(interval.steps[-1])
    interval.stop(len(batches.broken))
    flush(late)
    flush(interval)
    interval, late = _Interval(), None

  unknown = run.keep_best is not None and not run.keep_best.known

  def evaluators_at(step: int) -> list[Evaluator]:
    ends = step in (0, run.total_steps) or (unknown and step == run.start_step)
    return [e for e in run.evaluators if ends or step % e.every == 0]

  def evaluate(step: int) -> bool:
    """Whether the step is the best until now."""
    found: dict[str, float] = {}
    chosen = evaluators_at(step)
    for evaluator in chosen:
      flush_all()
      last = step == run.total_steps > run.start_step
      try:
        with contextlib.nullcontext() if last else interruptible():
          metrics = evaluator.run(step, state)
      except Interrupted:
        stop(step, evaluated=False)
      if metrics:
        found |= metrics
        writer.write(step, metrics)
        shown = ', '.join(f'{name} {value:.4g}' for name, value in metrics.items())
        _log.info('step %d: %s', step, shown)
      interval.restart_clock()
    if run.keep_best is None or (run.evaluators and not chosen):
      return False  # at most steps: asking the other processes would make the device wait
    return run.keep_best.improved(step, found, complete=len(chosen) == len(run.evaluators))

  def save(step: int, *, evaluated: bool = True, wait: bool = False) -> None:
    flush_all()
    facts = {'step': step, 'epoch': step * run.epochs_per_step, 'evaluated': evaluated}
    checkpoints.save(step, state, {**run.metadata, **facts}, wait=wait)
    interval.restart_clock()

  def stop(step: int, *, evaluated: bool) -> NoReturn:
    save(step, evaluated=evaluated, wait=True)
    cause = signals.received or 'a signal to another process'
    raise Stopped(
      f'{cause}: stopped at step {step}, saved {checkpoints.path(step)}; '
      'the same command continues from there'
    )

  in_flight: collections.deque = collections.deque()
  if (unknown or not run.evaluated) and evaluate(run.start_step):
    save(run.start_step)
  for step in range(run.start_step + 1, run.total_steps + 1):
    before = time.perf_counter()
    try:
      with interruptible():
        batch = next(batches)
    except Interrupted:
      stop(step - 1, evaluated=True)
    batch = sharding.put_batch(batch, run.mesh)
    interval.waited += time.perf_counter() - before
    first = step == run.start_step + 1
    if first:
      _log.info('compiling the training step')
    state, metrics = run.train_step(state, batch)
    interval.steps.append((step, metrics))
    if first:
      jax.block_until_ready(metrics)
      _log.info('compiled in %.1f s', time.perf_counter() - before)
      interval.restart_clock()
    stopping = vote(signals.received is not None)
    in_flight.append(metrics['loss'])
    if len(in_flight) > _IN_FLIGHT:
      in_flight.popleft().block_until_ready()
    if step % run.log_every == 0:
      interval.stop(len(batches.broken))
      flush(late)
      interval, late = _Interval(), interval
    if step == run.total_steps:
      evaluate(step)
      save(step, wait=True)
    elif stopping:
      stop(step, evaluated=not evaluators_at(step))
    else:
      best = evaluate(step)
      if best or (run.save_every and step % run.save_every == 0):
        save(step)
  return state


def _non_finite(step: int, metrics: dict[str, Any], checkpoints: Any) -> NonFiniteLoss:
  checkpoints.wait()
  latest = checkpoints.latest_step()
  good = (
    'no checkpoint was saved before that'
    if latest is None
    else f'the last good checkpoint is {checkpoints.path(latest)}'
  )
  values = ', '.join(f'{key} {metrics[key]:.4g}' for key in _FINITE)
  return NonFiniteLoss(
    f'no longer finite at step {step}: {values}; {good}. The same command continues from there'
  )
