"""What a pretraining run does now and then between steps: k-NN accuracy, pictures."""

import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hivit_jax.data.subset import Subset
from hivit_jax.tasks import knn, reconstruction
from hivit_jax.train import inputs, sharding
from hivit_jax.train.build import Steps
from hivit_jax.train.logging import MetricWriter
from hivit_jax.train.loop import Hook


def knn_hook(
  config: ml_collections.ConfigDict,
  task: Any,
  graphdef: nnx.GraphDef,
  mesh: Mesh,
  train_source: Any,
  eval_source: Any,
  steps: Steps,
) -> list[Hook]:
  """`eval/knn_top1`: accuracy of the evaluation set among neighbours of the training set."""
  options = config.knn
  if not options.every_epochs:
    return []
  bank_source = Subset(train_source, options.bank_size)

  @jax.jit
  def features(params, images):
    return task.features(nnx.merge(graphdef, params), images)

  def collect(params, source):
    values, labels = [], []
    with inputs.eval_batches(config, source, options.batch_size) as batches:
      for batch in batches:
        arrays = sharding.put_batch(batch, mesh)
        keep = sharding.fetch(arrays['mask'])
        values.append(sharding.fetch(features(params, arrays['image']))[keep])
        labels.append(sharding.fetch(arrays['label'])[keep])
    return np.concatenate(values), np.concatenate(labels)

  def evaluate(_, params):
    bank, bank_labels = collect(params, bank_source)
    queries, labels = collect(params, eval_source)
    predicted = knn.knn_predict(
      bank,
      bank_labels,
      queries,
      num_classes=train_source.num_classes,
      k=options.k,
      temperature=options.temperature,
    )
    return {'eval/knn_top1': float(np.mean(predicted == labels))}

  return [Hook(steps.of(options.every_epochs), evaluate)]


def picture_hook(
  config: ml_collections.ConfigDict,
  graphdef: nnx.GraphDef,
  eval_source: Any,
  steps: Steps,
  directory: pathlib.Path,
  writer: MetricWriter,
) -> list[Hook]:
  """Reconstructions of the same evaluation images each time, as PNG files and in TensorBoard."""
  options = config.pictures
  if not options.every_epochs or jax.process_index():
    return []
  source = Subset(eval_source, options.count)
  # Pictures are one process's business: its whole batch, no part of a global one.
  with inputs.eval_batches(config, source, len(source), alone=True) as batches:
    images = next(batches)['image']
  pictures = reconstruction.Reconstructor(
    graphdef, mean=tuple(config.data.mean), std=tuple(config.data.std)
  )

  def draw(at, params):
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
