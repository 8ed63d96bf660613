"""The training loop: the same for every task."""

import collections
import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hivit_jax.errors import Stopped, UserError
from hivit_jax.train import sharding

_log = logging.getLogger(__name__)
_IN_FLIGHT = 2  # steps given to the device beyond the one it works on


class NonFiniteLoss(UserError):
  """Loss or gradient is NaN or infinite; nothing of it was saved."""


@dataclasses.dataclass(frozen=True)
class Hook:
  """Something done between steps: an evaluation, pictures.

  Attributes:
    every: steps from one time to the next; also done at the start and the end of the run.
    run: `(step, params) -> metrics`, which are logged.
  """

  every: int
  run: Callable[[int, Any], dict[str, float]]


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
  """Collects the names of SIGTERM and SIGINT; a second one has its usual effect at once."""
  received: list[str] = []
  previous = {}

  def handle(number, frame):
    del frame
    received.append(signal.Signals(number).name)
    signal.signal(number, previous[number])

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.signal(number, handle)
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


class _Interval:
  """Metrics of the steps since the last log line, and where their time went."""

  def __init__(self):
    self.start = time.perf_counter()
    self.waited = 0.0  # seconds for data
    self.steps: list[tuple[int, dict[str, jax.Array]]] = []
    self.seconds = 0.0

  def stop(self) -> None:
    self.seconds = time.perf_counter() - self.start


def run(
  *,
  state: Any,
  train_step: Callable,
  batches: Iterator[dict[str, np.ndarray]],
  mesh: Mesh,
  start_step: int,
  total_steps: int,
  batch_size: int,
  epochs_per_step: float,
  hooks: Sequence[Hook],
  checkpoints: Any,
  metadata: dict[str, Any],
  save_every: int,
  writer: Any,
  progress: Any,
  log_every: int,
) -> Any:
  """Trains from `start_step` to `total_steps`.

  Metrics are fetched one interval late, so that the device never waits for the host. Evaluation
  and checkpoints look at them first: a state after a non-finite loss is never saved.

  Args:
    state: of the model and optimizer at `start_step`; donated.
    train_step: see `step.make_train_step`.
    batches: this process's batches from `start_step` on.
    mesh: the devices.
    start_step, total_steps: steps done, and when to end.
    batch_size: examples a step over all processes, for images/s.
    epochs_per_step: to tell epochs in the log.
    hooks: see `Hook`.
    checkpoints: see `checkpoint.Checkpoints`.
    metadata: saved with every checkpoint.
    save_every: steps between checkpoints; one more at the end.
    writer: has `write(step, metrics)`.
    progress: has `update(step, metrics)`.
    log_every: steps between log lines.

  Returns:
    The final state.

  Raises:
    NonFiniteLoss: with the step, the last good checkpoint and what to try.
    Stopped: after SIGTERM or SIGINT, with a checkpoint saved.
  """
  interval, late = _Interval(), None

  def flush(done: _Interval | None) -> None:
    if done is None or not done.steps:
      return
    values = jax.device_get([metrics for _, metrics in done.steps])
    for (step, _), metrics in zip(done.steps, values, strict=True):
      if not (math.isfinite(metrics['loss']) and math.isfinite(metrics['grad_norm'])):
        raise _non_finite(step, metrics, checkpoints)
    step = done.steps[-1][0]
    means = {key: float(np.mean([metrics[key] for metrics in values])) for key in values[0]}
    means['learning_rate'] = float(values[-1]['learning_rate'])
    means['images_per_second'] = batch_size * len(values) / done.seconds
    means['data_wait_fraction'] = done.waited / done.seconds
    means['epoch'] = step * epochs_per_step
    writer.write(step, {f'train/{key}': value for key, value in means.items()})
    shown = {'loss': means['loss'], 'images/s': means['images_per_second']}
    progress.update(step, shown)

  def flush_all() -> None:
    nonlocal interval, late
    interval.stop()
    flush(late)
    flush(interval)
    interval, late = _Interval(), None

  def call_hooks(step: int, force: bool) -> None:
    nonlocal interval
    for hook in hooks:
      if force or step % hook.every == 0:
        flush_all()
        metrics = hook.run(step, state['params'])
        if metrics:
          writer.write(step, metrics)
          shown = ', '.join(f'{name} {value:.4g}' for name, value in metrics.items())
          _log.info('step %d: %s', step, shown)
        interval = _Interval()

  def save(step: int, wait: bool) -> None:
    nonlocal interval
    flush_all()
    checkpoints.save(step, state, {**metadata, 'step': step}, wait=wait)
    interval = _Interval()

  in_flight: collections.deque = collections.deque()
  with stop_signals() as stopping:
    if start_step == 0:
      call_hooks(0, force=True)
    for step in range(start_step + 1, total_steps + 1):
      before = time.perf_counter()
      batch = sharding.put_batch(next(batches), mesh)
      interval.waited += time.perf_counter() - before
      state, metrics = train_step(state, batch)
      interval.steps.append((step, metrics))
      in_flight.append(metrics['loss'])
      if len(in_flight) > _IN_FLIGHT:
        in_flight.popleft().block_until_ready()
      if step % log_every == 0:
        interval.stop()
        flush(late)
        interval, late = _Interval(), interval
      last = step == total_steps
      if stopping:
        save(step, wait=True)
        raise Stopped(
          f'{stopping[0]}: stopped at step {step}, saved {checkpoints.path(step)}; '
          'the same command continues from there'
        )
      call_hooks(step, force=last)
      if last or step % save_every == 0:
        save(step, wait=last)
  return state


def _non_finite(step: int, metrics: dict[str, Any], checkpoints: Any) -> NonFiniteLoss:
  checkpoints.wait()
  latest = checkpoints.latest_step()
  good = (
    'no checkpoint was saved before'
    if latest is None
    else (f'the last good checkpoint is {checkpoints.path(latest)}')
  )
  return NonFiniteLoss(
    f'step {step}: loss {metrics["loss"]:.4g}, gradient norm {metrics["grad_norm"]:.4g}; {good}. '
    'The same command goes on from there; what helps: --config.optim.clip_norm=1.0, a lower '
    '--config.optim.base_lr, a longer warmup, --config.model.dtype=float32'
  )
