"""What is measured and drawn between steps, and of weights without training."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from hivit_jax.data.sources.subset import Subset
from hivit_jax.errors import UserError
from hivit_jax.models import targets
from hivit_jax.reporting.metrics import MetricWriter
from hivit_jax.runtime import distributed
from hivit_jax.tasks import knn, reconstruction
from hivit_jax.tasks.evaluators import Evaluator
from hivit_jax.train import assemble, inputs, sharding
from hivit_jax.train.setup import Setup


def evaluators(setup: Setup, task: Any, graphdef: nnx.GraphDef) -> list[Evaluator]:
  """What measures a model: the same for training and for `--mode=evaluate`.

  Args:
    setup: whose config says what and how often.
    task: of the model.
    graphdef: of the model, for `nnx.merge` with the parameters of a state.
  """
  config, found = setup.config, []
  if config.evaluation.every_epochs and setup.labelled_source is not None:
    every = setup.steps.of(config.evaluation.every_epochs)
    found.append(Evaluator(every, _Accuracy(setup, task, graphdef)))
  if config.knn.every_epochs:
    every = setup.steps.of(config.knn.every_epochs)
    found.append(Evaluator(every, _NearestNeighbours(setup, task, graphdef)))
  return found


class _Accuracy:
  """`eval/top1`, `eval/top5`, `eval/loss` of the evaluation set; `eval/ema_*` of the average.

  Shares of the examples that could be read, each counted once, however many devices and hosts.
  """

  def __init__(self, setup: Setup, task: Any, graphdef: nnx.GraphDef):
    self._setup = setup
    self._sums = jax.jit(lambda params, batch: task.evaluate(nnx.merge(graphdef, params), batch))

  def __call__(self, step: int, state: Any) -> dict[str, float]:
    setup, source = self._setup, self._setup.labelled_source
    models = {'': sharding.whole(state['params'], setup.mesh)}
    if 'ema' in state:
      models['ema_'] = sharding.whole(state['ema'], setup.mesh)
    results = []
    with setup.eval_batches(source) as batches:
      for batch in batches:
        arrays = sharding.put_batch(batch, setup.mesh)
        results.append({prefix: self._sums(params, arrays) for prefix, params in models.items()})
        # One batch late: the device never waits, nor has it more than two batches.
        results[-2:-1] = jax.device_get(results[-2:-1])
    results = jax.device_get(results)
    metrics = {}
    for prefix in models:
      parts = [result[prefix] for result in results]
      totals = {key: np.sum([part[key] for part in parts], dtype=np.float64) for key in parts[0]}
      count = totals.pop('count')
      if not count:
        raise _no_labels(source)
      metrics |= {f'eval/{prefix}{key}': float(total / count) for key, total in totals.items()}
    return metrics


class _NearestNeighbours:
  """`eval/knn_top1`: accuracy of the evaluation set among neighbours of the training set."""

  def __init__(self, setup: Setup, task: Any, graphdef: nnx.GraphDef):
    train_source = setup.train_source
    if not train_source.num_classes:
      raise UserError(
        f'{train_source.name} ({train_source.split}) has no class folders, which the k-NN accuracy '
        'compares with; switch it off: --config.knn.every_epochs=0'
      )
    self._setup = setup
    self._bank = Subset(train_source, setup.config.knn.bank_size)
    self._features = jax.jit(
      lambda params, images: task.features(nnx.merge(graphdef, params), images)
    )

  def __call__(self, step: int, state: Any) -> dict[str, float]:
    setup, options = self._setup, self._setup.config.knn
    params = sharding.whole(state['params'], setup.mesh)
    parts = self._parts(params, setup.eval_source)
    queries, labels = _rows(parts, len(setup.eval_source))
    known = labels >= 0
    if not known.any():
      raise _no_labels(setup.eval_source)
    neighbours = knn.Neighbours(queries, k=options.k, bank_size=len(self._bank))
    for part, part_labels in self._parts(params, self._bank):  # that of ImageNet would be 5 GB
      neighbours.add(part, part_labels)
    predicted = neighbours.predict(
      num_classes=setup.train_source.num_classes, temperature=options.temperature
    )
    return {'eval/knn_top1': float(np.mean((predicted == labels)[known]))}

  def _parts(self, params: Any, source: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features (B, D) and labels (B,) of a source, batch by batch, on every process."""
    with self._setup.eval_batches(source) as batches:
      for batch in batches:
        arrays = sharding.put_batch(batch, self._setup.mesh)
        keep = sharding.fetch(arrays['mask'])
        values = sharding.fetch(self._features(params, arrays['image']))[keep]
        yield values, sharding.fetch(arrays['label'])[keep]


def _rows(
  parts: Iterator[tuple[np.ndarray, np.ndarray]], most: int
) -> tuple[np.ndarray, np.ndarray]:
  """Parts one after the other, `most` rows at most, each copied once."""
  values, labels, count = np.zeros((most, 0)), np.zeros(most, np.int32), 0
  for part, part_labels in parts:
    if not count:
      values = np.empty((most, part.shape[1]), part.dtype)
    place = slice(count, count + len(part))
    values[place], labels[place] = part, part_labels
    count += len(part)
  return values[:count], labels[:count]


def _no_labels(source: Any) -> UserError:
  return UserError(
    f'none of the {len(source)} examples of {source.name} ({source.split}) has a label; '
    'choose another --config.data.eval_split, or evaluate nothing: '
    '--config.evaluation.every_epochs=0 --config.knn.every_epochs=0'
  )


def pictures(
  setup: Setup, graphdef: nnx.GraphDef, directory: pathlib.Path, writer: MetricWriter
) -> list[Evaluator]:
  """Reconstructions of the same evaluation images each time, as PNG files and in TensorBoard."""
  config, options = setup.config, setup.config.pictures
  if not assemble.is_pretraining(config) or not options.every_epochs:
    return []
  if config.model.target not in (None, targets.PIXELS):
    return []  # there are none of features
  source = Subset(setup.eval_source, options.count)
  # Pictures are one process's business: its whole batch, no part of a global one.
  with inputs.eval_batches(config, source, len(source), alone=True) as batches:
    images = next(batches)['image']
  reconstruct = reconstruction.Reconstructor(
    graphdef, mean=tuple(config.data.mean), std=tuple(config.data.std)
  )

  def draw(at: int, state: Any) -> dict[str, float]:
    params = sharding.whole(state['params'], setup.mesh)  # all processes take part
    if not distributed.primary():
      return {}
    result = reconstruct(sharding.local(params), images, seed=config.seed)
    picture = reconstruction.draw(result, title=f'{config.model.name}, step {at}')
    path = directory / 'reconstructions' / f'step_{at:08d}.png'
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix('.tmp')  # a kill leaves no half picture under the final name
    picture.save(unfinished, 'PNG')
    unfinished.replace(path)
    writer.write_image(at, 'reconstructions', np.asarray(picture))
    return {}

  return [Evaluator(setup.steps.of(options.every_epochs), draw)]


def newest_picture(directory: pathlib.Path) -> pathlib.Path | None:
  """The last picture that a run in `directory` has made."""
  return max((directory / 'reconstructions').glob('step_*.png'), default=None)
