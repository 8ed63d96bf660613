"""What is measured or drawn between the steps of a run, and of weights without training."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

State = Mapping[str, Any]  # `params` and, with an average of them, `ema`
Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Something done between steps: an accuracy, pictures.

  Attributes:
    every: steps from one time to the next; also done at the start and the end of the run.
    run: `(step, state) -> metrics`, which are logged. A signal to stop may interrupt it anywhere;
      the continued run then does it again.
  """

  every: int
  run: Callable[[int, Any], Metrics]


class Context(Protocol):
  """What evaluators measure with.

  Attributes:
    task: of the model.
    graphdef: the model's static half, for `nnx.merge` with the parameters of a state.
    model_name: `config.model.name`.
    seed: of the run.
    sets: evaluation sets by the beginning of their metrics: 'eval', and 'eval_NAME' for more.
    class_sets: the same with labels of the model's classes; empty for a model without classes.
    train_source: training examples; None where the config needs none.
    draws: pictures have a place to go.
  """

  @property
  def task(self) -> Any: ...
  @property
  def graphdef(self) -> nnx.GraphDef: ...
  @property
  def model_name(self) -> str: ...
  @property
  def seed(self) -> int: ...
  @property
  def sets(self) -> Mapping[str, Any]: ...
  @property
  def class_sets(self) -> Mapping[str, Any]: ...
  @property
  def train_source(self) -> Any: ...
  @property
  def draws(self) -> bool: ...

  @property
  def devices(self) -> Sequence[Any]:
    """This process's devices."""
    ...

  def every(self, section: str) -> int | None:
    """Steps between evaluations, from `every_epochs` of a section of the config; None: never."""
    ...

  def setting(self, key: str) -> Any:
    """The value of a dotted key of the config, such as knn.k."""
    ...

  def batches(
    self, source: Any, transform: Callable[..., Any] | None = None
  ) -> AbstractContextManager[Iterator[dict[str, jax.Array]]]:
    """One pass over a source, as global arrays; `mask` and `index` tell padding from examples.

    Args:
      source: the examples.
      transform: of an example; None: the task's of evaluation.
    """
    ...

  def own_batches(self, source: Any) -> AbstractContextManager[Iterator[dict[str, Any]]]:
    """This process's share of one pass, as numpy arrays, or lists of them where shapes differ."""
    ...

  def some(self, source: Any, size: int) -> Any:
    """Evenly spread examples of a source, at most so many; 0: all."""
    ...

  def examples(self, source: Any) -> dict[str, np.ndarray]:
    """All examples of a small source as one batch, on this process."""
    ...

  def whole(self, params: Any) -> Any:
    """Parameters as arrays that every device has all of; all processes take part."""
    ...

  def local(self, params: Any) -> Any:
    """Parameters as arrays that this process's devices have all of; all processes take part."""
    ...

  def total(self, counts: np.ndarray) -> np.ndarray:
    """The sum over all processes of int64 counts, on every process."""
    ...

  def here(self, params: Any) -> Any:
    """Parameters as process 0's own arrays, None on the others; all processes take part."""
    ...

  def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function whose results, such as sums, every device has all of."""
    ...

  def fetch(self, array: jax.Array) -> np.ndarray:
    """A global array on every process."""
    ...

  def keep(self, step: int, name: str, text: str, data: str) -> None:
    """Keeps a text and its JSON as NAME/step_STEP.txt and .json, or logs it without a workdir."""
    ...

  def store(self, name: str, data: str) -> None:
    """Keeps a text, such as JSON, as results/NAME, instead of the one before.

    In the workdir, or for weights that are in none in the current directory.
    """
    ...

  def draw(self, step: int, name: str, picture: Any) -> None:
    """Keeps a PIL image as NAME/step_STEP.png in the workdir and in TensorBoard."""
    ...


def setting_of(name: str) -> str:
  """The flag that chooses an evaluation set, for messages; `name` as in `Context.sets`."""
  return '--config.data.eval_split' if name == 'eval' else '--config.evaluation.more'


class Summed:
  """Sums over all examples of a set, whatever the number of devices and processes.

  It gives NAME/METRIC for the parameters and NAME/ema_METRIC for their average, if there is one.
  """

  def __init__(
    self,
    context: Context,
    source: Any,
    update: Callable[[Any, Mapping[str, jax.Array]], Any],
    finish: Callable[[Any], Metrics],
    *,
    name: str = 'eval',
  ):
    """Nothing is computed yet.

    Args:
      context: what to measure with.
      source: the examples.
      update: `(model, batch) -> tree of arrays`, sums over a batch. Rows whose `mask` is False are
        padding or broken, and must not count. The model is in its evaluation mode.
      finish: the tree of float64 arrays, added over all batches -> metrics.
      name: of the set, before the metrics.
    """
    self._context, self._source, self._finish, self._name = context, source, finish, name
    self._update = context.jit(of_model(context.graphdef, update))

  def __call__(self, step: int, state: State) -> Metrics:
    del step
    models, totals = _models(self._context, state), {}

    def add(parts: Mapping[str, Any] | None) -> None:
      for prefix, sums in ({} if parts is None else jax.device_get(parts)).items():
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        totals[prefix] = jax.tree.map(np.add, totals[prefix], sums) if prefix in totals else sums

    late = None
    with self._context.batches(self._source) as batches:
      for batch in batches:
        parts = {prefix: self._update(params, batch) for prefix, params in models.items()}
        # One batch late: the device never waits, nor has it more than two batches.
        add(late)
        late = parts
    add(late)
    return _named(self._name, {prefix: self._finish(sums) for prefix, sums in totals.items()})


class Collected:
  """Results for each example of a set, collected on the host in the order of the source.

  All of them are in memory at once, on every process. Metrics are named as by `Summed`.
  """

  def __init__(
    self,
    context: Context,
    source: Any,
    predict: Callable[[Any, Mapping[str, jax.Array]], Any],
    finish: Callable[[Any, np.ndarray], Metrics],
    *,
    name: str = 'eval',
    host: Callable[[Any], Any] = lambda results: results,
  ):
    """Nothing is computed yet.

    Args:
      context: what to measure with.
      source: the examples.
      predict: `(model, batch) -> tree of arrays (B, ...)`; targets that `finish` needs are passed
        through.
      finish: the tree with a row for each example that could be read, and (N,) the positions of
        these in the source, rising -> metrics.
      name: of the set, before the metrics.
      host: what is kept of each batch's results: a tree of numpy arrays with a row for each
        example, such as an array of lists.
    """
    self._context, self._source, self._finish, self._name = context, source, finish, name
    self._predict, self._host = jax.jit(of_model(context.graphdef, predict)), host

  def __call__(self, step: int, state: State) -> Metrics:
    del step
    metrics = {}
    for prefix, params in _models(self._context, state).items():
      found = rows(self._context, self._predict, params, self._source)
      parts = [(self._host(results), index) for results, index in found]
      index = np.concatenate([index for _, index in parts])
      order = np.argsort(index, kind='stable')
      results = jax.tree.map(
        lambda *parts: np.concatenate(parts)[order],  # noqa: B023
        *(results for results, _ in parts),
      )
      metrics[prefix] = self._finish(results, index[order])
    return _named(self._name, metrics)


def of_sets(
  context: Context,
  task: Any,
  measure: Callable[[Context, Any, Any, str], Callable[[int, Any], Metrics]],
  pictures: Callable[[Context, Any], Callable[[int, Any], Metrics]],
) -> list[Evaluator]:
  """A measurement of every evaluation set, and pictures, as often as the config says.

  Args:
    context: see `Context`.
    task: whose evaluators they are.
    measure: `(context, task, source, name) -> run` for a set and the beginning of its metrics.
    pictures: `(context, task) -> run`.
  """
  found = []
  if (every := context.every('evaluation')) is not None:
    found += [
      Evaluator(every, measure(context, task, source, name))
      for name, source in context.sets.items()
    ]
  if (every := context.every('pictures')) is not None and context.draws:
    found.append(Evaluator(every, pictures(context, task)))
  return found


def rows(
  context: Context,
  function: Callable[..., Any],
  params: Any,
  source: Any,
  transform: Callable[..., Any] | None = None,
) -> Iterator[tuple[Any, np.ndarray]]:
  """Results for each example of a source, batch by batch, on every process.

  Args:
    context: what to measure with.
    function: `(params, batch) -> tree of global arrays (B, ...)`.
    params: its first argument.
    source: the examples.
    transform: see `Context.batches`.

  Yields:
    The results without padding and broken examples, and the positions of theirs in the source.
  """
  with context.batches(source, transform) as batches:
    for batch in batches:
      results = function(params, batch)
      keep = context.fetch(batch['mask'])
      yield (
        jax.tree.map(lambda x: context.fetch(x)[keep], results),  # noqa: B023
        context.fetch(batch['index'])[keep],
      )


def of_model(graphdef: nnx.GraphDef, function: Callable[..., Any]) -> Callable[..., Any]:
  """`(model, batch) -> results` as a function of parameters, the model in its evaluation mode."""

  def of_params(params: Any, batch: Mapping[str, jax.Array]) -> Any:
    model = nnx.merge(graphdef, params)
    model.eval()  # running statistics, no dropout
    return function(model, batch)

  return of_params


def _models(context: Context, state: State) -> dict[str, Any]:
  """The parameters and their average, by the prefix of their metrics."""
  models = {'': context.whole(state['params'])}
  if 'ema' in state:
    models['ema_'] = context.whole(state['ema'])
  return models


def _named(name: str, metrics: Mapping[str, Metrics]) -> Metrics:
  return {
    f'{name}/{prefix}{key}': float(value)
    for prefix, own in metrics.items()
    for key, value in own.items()
  }
