"""What the nearest neighbours of features vote for: the class of an image, or of each of its units.

Where examples have labels, training images vote for the class of an evaluation image. Where they
have label maps instead, units of the training images vote for the class of a unit; a training unit
votes for the class of most of its pixels.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.errors import UserError
from hivit_jax.tasks import miou
from hivit_jax.tasks.evaluators import Context, Evaluator, Metrics, of_model, rows, setting_of
from hivit_jax.tasks.neighbours import Neighbours

_OFF = 'switch it off: --config.knn.every_epochs=0'


def evaluators(
  context: Context,
  features: Callable[[Any, jax.Array], jax.Array],
  unit_features: Callable[[Any, jax.Array], jax.Array],
) -> list[Evaluator]:
  """`NAME/knn_top1`, or `NAME/knn_miou` of examples with label maps and without labels.

  Args:
    context: what to measure with.
    features: `(model, images) -> (B, D)`.
    unit_features: `(model, images) -> (B, rows, columns, D)`, of the units of images.
  """
  every = context.every('knn')
  if every is None:
    return []
  source = context.train_source
  if not source.num_classes:
    raise UserError(
      f'{source.name} ({source.split}) has no class folders, which the k-NN accuracy compares '
      f'with; {_OFF}'
    )
  kind = _of_units(context, unit_features) if _has_label_maps(source) else _of_images(features)
  return [Evaluator(every, _Votes(context, kind))]


def no_labels(source: Any, name: str) -> UserError:
  """The error for an evaluation set without a label; `name` as in `Context.sets`."""
  return UserError(
    f'none of the {len(source)} examples of {source.name} ({source.split}) has a label; '
    f'choose another {setting_of(name)}, or evaluate nothing: '
    '--config.evaluation.every_epochs=0 --config.knn.every_epochs=0'
  )


def _has_label_maps(source: Any) -> bool:
  """Whether there are label maps, and no labels, which come first."""
  example = source[0]
  return 'segmentation' in example and 'label' not in example


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What the neighbours predict for an example: its class, or the class of each unit.

  Attributes:
    describe: `(model, batch) -> (B, rows, D) features, (B, rows, ...) truth`.
    classes: truth (n, ...) -> (n,) classes, -1 where none is known.
    metrics: truth (n, ...) and predicted classes (n,), -1 where there is none -> metrics.
    transform: of evaluation, instead of the task's.
  """

  describe: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  classes: Callable[[np.ndarray], np.ndarray]
  metrics: Callable[[np.ndarray, np.ndarray], Metrics]
  transform: Callable[..., Any] | None = None


def _of_images(features: Callable[[Any, jax.Array], jax.Array]) -> _Kind:
  def accuracy(labels: np.ndarray, predicted: np.ndarray) -> Metrics:
    return {'knn_top1': float(np.mean((predicted == labels)[labels >= 0]))}

  return _Kind(
    describe=lambda model, b: (features(model, b['image'])[:, None], b['label'][:, None]),
    classes=lambda labels: labels,
    metrics=accuracy,
  )


def _of_units(context: Context, features: Callable[[Any, jax.Array], jax.Array]) -> _Kind:
  # Here: a benchmark of a step needs no data.
  from hivit_jax.data.segmentation_transforms import KEYS, ClassMap

  trained, count = context.train_source, len(context.train_source.class_names)
  for source in context.sets.values():
    if not _has_label_maps(source) or source.class_names != trained.class_names:
      raise UserError(
        f'{source.name} ({source.split}) has no label maps of the classes of {trained.name} '
        f'({trained.split}), whose units the k-NN segmentation compares with; {_OFF}'
      )
  ignored = context.setting('segment.ignore_index')
  classes = ClassMap(count, ignored, context.setting('segment.reduce_zero_label'))

  def describe(model, batch):
    found = features(model, batch['image'])  # (B, rows, columns, D)
    b, rows, columns, width = found.shape
    pixels = pixels_of_units(batch['segmentation'], (rows, columns), count)
    return found.reshape(b, rows * columns, width), pixels

  def score(pixels: np.ndarray, predicted: np.ndarray) -> Metrics:
    confusion = np.zeros((count + 1, count + 1), np.int64)
    for i in range(-1, count):  # -1, no prediction, is a class that no pixel has
      confusion[:count, i] = pixels[predicted == i].sum(axis=0)
    return {'knn_miou': float(np.nanmean(miou.scores(confusion)['iou'][:count]))}

  return _Kind(
    describe=describe,
    classes=lambda pixels: np.where(pixels.any(axis=1), pixels.argmax(axis=1), -1),
    metrics=score,
    transform=context.task.transforms(False, keys=KEYS, steps=(classes,)),
  )


def pixels_of_units(labels: jax.Array, grid: tuple[int, int], classes: int) -> jax.Array:
  """Pixels of each class in each unit: (B, H, W) integers -> (B, rows * columns, classes) int32.

  Args:
    labels: of the pixels; what is no class does not count.
    grid: (rows, columns) of units.
    classes: how many.
  """
  (b, height, width), (rows, columns) = labels.shape, grid
  cut = labels.reshape(b, rows, height // rows, columns, width // columns).swapaxes(2, 3)
  cut = jnp.minimum(cut.reshape(b, rows * columns, -1).astype(jnp.int32), classes)
  place = jnp.arange(rows * columns)[:, None] * (classes + 1) + cut
  length = rows * columns * (classes + 1)
  counts = jax.vmap(lambda x: jnp.bincount(x.ravel(), length=length))(place)
  return counts.reshape(b, rows * columns, classes + 1)[..., :classes]


class _Votes:
  """The queries of all sets are collected; the bank passes by: that of ImageNet would be 5 GB."""

  def __init__(self, context: Context, kind: _Kind):
    self._context, self._kind = context, kind
    self._bank = context.some(context.train_source, context.setting('knn.bank_size'))
    self._describe = jax.jit(of_model(context.graphdef, kind.describe))

  def __call__(self, step: int, state: Any) -> Metrics:
    del step
    context, kind = self._context, self._kind
    params = context.whole(state['params'])
    found = {
      name: _joined(self._parts(params, source), len(source))
      for name, source in context.sets.items()
    }
    for name, (_, truth) in found.items():
      if not (kind.classes(truth) >= 0).any():
        raise no_labels(context.sets[name], name)
    queries = [queries for queries, _ in found.values()]
    neighbours = None
    for part, truth in self._parts(params, self._bank):
      if neighbours is None:
        neighbours = Neighbours(
          queries[0] if len(queries) == 1 else np.concatenate(queries),
          k=context.setting('knn.k'),
          bank_size=len(self._bank) * part.shape[1],
        )
      labels = kind.classes(_rows(truth))
      neighbours.add(_rows(part)[labels >= 0], labels[labels >= 0])
    assert neighbours is not None  # a source has examples
    predicted = neighbours.predict(
      num_classes=context.train_source.num_classes, temperature=context.setting('knn.temperature')
    )
    ends = np.cumsum([len(truth) for _, truth in found.values()])
    return {
      f'{name}/{key}': value
      for (name, (_, truth)), own in zip(found.items(), np.split(predicted, ends[:-1]), strict=True)
      for key, value in kind.metrics(truth, own).items()
    }

  def _parts(self, params: Any, source: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features (B, rows, D) and truth (B, rows, ...), batch by batch, on every process."""
    parts = rows(self._context, self._describe, params, source, self._kind.transform)
    return (found for found, _ in parts)


def _rows(x: np.ndarray) -> np.ndarray:
  """(B, rows, ...) -> (B * rows, ...)."""
  return x.reshape(-1, *x.shape[2:])


def _joined(
  parts: Iterator[tuple[np.ndarray, np.ndarray]], most: int
) -> tuple[np.ndarray, np.ndarray]:
  """The rows of all parts, of `most` examples at most, each copied once."""
  joined, count = (), 0
  for part in parts:
    if not joined:
      joined = tuple(np.empty((most, *x.shape[1:]), x.dtype) for x in part)
    for whole, own in zip(joined, part, strict=True):
      whole[count : count + len(own)] = own
    count += len(part[0])
  features, truth = (_rows(whole[:count]) for whole in joined)
  return features, truth
