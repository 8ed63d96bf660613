"""What a run does now and then between steps: accuracies, pictures."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hivit_jax.data.sources.subset import Subset
from hivit_jax.errors import UserError
from hivit_jax.reporting.metrics import MetricWriter
from hivit_jax.runtime import distributed
from hivit_jax.tasks import knn, reconstruction
from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.train import assemble, inputs, sharding
from hivit_jax.train.assemble import Steps
from hivit_jax.train.loop import Hook


def accuracy_hook(
  config: ml_collections.ConfigDict,
  task: Any,
  graphdef: nnx.GraphDef,
  mesh: Mesh,
  eval_source: Any,
  steps: Steps,
  told: set[str] | None = None,
) -> list[Hook]:
  """`eval/top1`, `eval/top5`, `eval/loss` of the evaluation set; `eval/ema_*` of the average.

  Shares of the examples that could be read, each counted once, however many devices and hosts.
  `told`: broken examples that the log has already.
  """
  every = config.evaluation.every_epochs
  if not every or not isinstance(task, ClassifyTask):
    return []

  @jax.jit
  def sums(params, batch):
    return task.evaluate(nnx.merge(graphdef, params), batch)

  def evaluate(_, state):
    models = {'': sharding.whole(state['params'], mesh)}
    if 'ema' in state:
      models['ema_'] = sharding.whole(state['ema'], mesh)
    results = []
    size = config.evaluation.batch_size
    with inputs.eval_batches(config, eval_source, size, told=told) as batches:
      for batch in batches:
        arrays = sharding.put_batch(batch, mesh)
        results.append({prefix: sums(params, arrays) for prefix, params in models.items()})
        # One batch late: the device never waits, nor has it more than two batches.
        results[-2:-1] = jax.device_get(results[-2:-1])
    results = jax.device_get(results)
    metrics = {}
    for prefix in models:
      parts = [result[prefix] for result in results]
      totals = {key: np.sum([part[key] for part in parts], dtype=np.float64) for key in parts[0]}
      count = totals.pop('count')
      if not count:
        raise _no_labels(eval_source)
      metrics |= {f'eval/{prefix}{key}': float(total / count) for key, total in totals.items()}
    return metrics

  return [Hook(steps.of(every), evaluate)]


def knn_hook(
  config: ml_collections.ConfigDict,
  task: Any,
  graphdef: nnx.GraphDef,
  mesh: Mesh,
  train_source: Any,
  eval_source: Any,
  steps: Steps,
  told: set[str] | None = None,
) -> list[Hook]:
  """`eval/knn_top1`: accuracy of the evaluation set among neighbours of the training set.

  `told`: broken examples that the log has already.
  """
  options = config.knn
  if not options.every_epochs:
    return []
  if not train_source.num_classes:
    raise UserError(
      f'{train_source.name} ({train_source.split}) has no class folders, which the k-NN accuracy '
      'compares with; switch it off: --config.knn.every_epochs=0'
    )
  bank_source = Subset(train_source, options.bank_size)

  @jax.jit
  def features(params, images):
    return task.features(nnx.merge(graphdef, params), images)

  def parts(params, source):
    size = config.evaluation.batch_size
    with inputs.eval_batches(config, source, size, told=told) as batches:
      for batch in batches:
        arrays = sharding.put_batch(batch, mesh)
        keep = sharding.fetch(arrays['mask'])
        values = sharding.fetch(features(params, arrays['image']))[keep]
        yield values, sharding.fetch(arrays['label'])[keep]

  def evaluate(_, state):
    params = sharding.whole(state['params'], mesh)
    queries, labels = _rows(parts(params, eval_source), len(eval_source))
    known = labels >= 0
    if not known.any():
      raise _no_labels(eval_source)
    neighbours = knn.Neighbours(queries, k=options.k, bank_size=len(bank_source))
    for part, part_labels in parts(params, bank_source):  # that of ImageNet would be 5 GB
      neighbours.add(part, part_labels)
    predicted = neighbours.predict(
      num_classes=train_source.num_classes, temperature=options.temperature
    )
    return {'eval/knn_top1': float(np.mean((predicted == labels)[known]))}

  return [Hook(steps.of(options.every_epochs), evaluate)]


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


def picture_hook(
  config: ml_collections.ConfigDict,
  graphdef: nnx.GraphDef,
  mesh: Mesh,
  eval_source: Any,
  steps: Steps,
  directory: pathlib.Path,
  writer: MetricWriter,
) -> list[Hook]:
  """Reconstructions of the same evaluation images each time, as PNG files and in TensorBoard."""
  options = config.pictures
  if not assemble.is_pretraining(config) or not options.every_epochs:
    return []
  source = Subset(eval_source, options.count)
  # Pictures are one process's business: its whole batch, no part of a global one.
  with inputs.eval_batches(config, source, len(source), alone=True) as batches:
    images = next(batches)['image']
  pictures = reconstruction.Reconstructor(
    graphdef, mean=tuple(config.data.mean), std=tuple(config.data.std)
  )

  def draw(at, state):
    params = sharding.whole(state['params'], mesh)  # all processes take part
    if not distributed.primary():
      return {}
    result = pictures(sharding.local(params), images, seed=config.seed)
    picture = reconstruction.draw(result, title=f'{config.model.name}, step {at}')
    path = directory / 'reconstructions' / f'step_{at:08d}.png'
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix('.tmp')  # a kill leaves no half picture under the final name
    picture.save(unfinished, 'PNG')
    unfinished.replace(path)
    writer.write_image(at, 'reconstructions', np.asarray(picture))
    return {}

  return [Hook(steps.of(options.every_epochs), draw)]


def newest_picture(directory: pathlib.Path) -> pathlib.Path | None:
  """The last picture that a run in `directory` has made."""
  return max((directory / 'reconstructions').glob('step_*.png'), default=None)
