"""What connects the evaluators of tasks with devices, data and the workdir."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from hivit_jax import settings
from hivit_jax.data.sources.subset import spread
from hivit_jax.errors import UserError
from hivit_jax.reporting.metrics import MetricWriter
from hivit_jax.runtime import distributed
from hivit_jax.tasks import Task
from hivit_jax.tasks.evaluators import Evaluator
from hivit_jax.train import sharding, validate
from hivit_jax.train.setup import Setup

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class EvaluationContext:
  """The `Context` of evaluators.

  Attributes:
    setup: config, devices and data.
    graphdef: of the model.
    directory: of the run; None: pictures have no place to go.
    results: where results go without a run that is going on; None: as `directory`.
    writer: of the run, as soon as there is one, for pictures in TensorBoard.
  """

  setup: Setup
  graphdef: nnx.GraphDef
  directory: pathlib.Path | None = None
  results: pathlib.Path | None = None
  writer: MetricWriter | None = None

  @property
  def task(self) -> Task:
    return self.setup.task

  @property
  def model_name(self) -> str:
    return self.setup.config.model.name

  @property
  def seed(self) -> int:
    return self.setup.config.seed

  @property
  def sets(self) -> Mapping[str, Any]:
    return self.setup.sets

  @property
  def class_sets(self) -> Mapping[str, Any]:
    return self.setup.class_sets

  @property
  def train_source(self) -> Any:
    return self.setup.train_source

  @property
  def draws(self) -> bool:
    return self.directory is not None

  @property
  def devices(self) -> Sequence[Any]:
    return [d for d in self.setup.mesh.devices.flat if d.process_index == jax.process_index()]

  def every(self, section: str) -> int | None:
    epochs = self.setting(f'{section}.every_epochs')
    return self.setup.steps.of(epochs) if epochs else None

  def setting(self, key: str) -> Any:
    return settings.get(self.setup.config, key)

  @contextlib.contextmanager
  def batches(
    self, source: Any, transform: Callable[..., Any] | None = None
  ) -> Iterator[Iterator[dict[str, jax.Array]]]:
    with self.setup.eval_batches(source, transform) as batches:
      yield (sharding.put_batch(batch, self.setup.mesh) for batch in batches)

  def own_batches(self, source: Any) -> contextlib.AbstractContextManager[Iterator[dict[str, Any]]]:
    return self.setup.eval_batches(source)

  def some(self, source: Any, size: int) -> Any:
    return spread(source, size)

  def examples(self, source: Any) -> dict[str, np.ndarray]:
    with self.setup.eval_batches(source, alone=True) as batches:
      return next(batches)

  def whole(self, params: Any) -> Any:
    return sharding.whole(params, self.setup.mesh)

  def local(self, params: Any) -> Any:
    params = self.whole(params)
    if jax.process_count() == 1:
      return params
    mine = sharding.make_mesh(devices=self.devices)
    return jax.device_put(sharding.local(params), sharding.replicated(mine))

  def total(self, counts: np.ndarray) -> np.ndarray:
    return sharding.total(counts)

  def here(self, params: Any) -> Any:
    params = self.whole(params)
    return sharding.local(params) if distributed.primary() else None

  def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, out_shardings=sharding.replicated(self.setup.mesh))

  def fetch(self, array: jax.Array) -> np.ndarray:
    return sharding.fetch(array)

  def keep(self, step: int, name: str, text: str, data: str) -> None:
    if not distributed.primary():
      return
    if self.directory is None:
      _log.info('%s\n%s', name, text)
      return
    for suffix, content in (('.txt', text), ('.json', data)):
      _write(self.directory / name / f'step_{step:08d}{suffix}', content)

  def store(self, name: str, data: str) -> None:
    folder = self.results or self.directory
    if folder is None or not distributed.primary():
      return
    path = folder / 'results' / name
    try:
      _write(path, data)
    except OSError as error:
      raise UserError(f'cannot write {path}: {error.strerror}') from error
    _log.info('results: %s', path)

  def draw(self, step: int, name: str, picture: Any) -> None:
    assert self.directory is not None
    if not distributed.primary():
      return
    path = self.directory / name / f'step_{step:08d}.png'
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix('.tmp')  # a kill leaves no half picture under the final name
    picture.save(unfinished, 'PNG')
    unfinished.replace(path)
    if self.writer is not None:
      self.writer.write_image(step, name, np.asarray(picture))


def _write(path: pathlib.Path, content: str) -> None:
  """Writes a file that appears complete; a kill leaves the one before."""
  path.parent.mkdir(exist_ok=True)
  unfinished = path.with_suffix('.tmp')
  unfinished.write_text(f'{content}\n', 'utf-8')
  unfinished.replace(path)


def evaluators(context: EvaluationContext) -> list[Evaluator]:
  """Those of the task and those that `config.evaluators` names, for training and evaluation.

  Raises:
    UserError: there is no such evaluator, or the data do not fit one.
  """
  found = list(context.task.evaluators(context))
  for name in validate.listed(context.setup.config.evaluators):
    factory = settings.imported(name, 'config.evaluators')
    made = factory(context) if callable(factory) else factory
    if not isinstance(made, Evaluator):
      raise UserError(
        f'config.evaluators={name}: expected a function from a context to an Evaluator, see '
        f'hivit_jax/tasks/evaluators.py; it gives {type(made).__name__}'
      )
    found.append(made)
  return found


def newest_picture(directory: pathlib.Path) -> pathlib.Path | None:
  """The last picture that a run in `directory` has made."""
  return max(directory.glob('*/step_*.png'), key=lambda path: path.name, default=None)
