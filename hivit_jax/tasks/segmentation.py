"""Segmenters on images of any size: inference, mIoU, pictures."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hivit_jax.tasks import miou, pixels, segmentation_pictures, views
from hivit_jax.tasks.evaluators import Context, Evaluator, Metrics, of_model, of_sets
from hivit_jax.tasks.images import as_bytes

Example = Mapping[str, np.ndarray]
_NAME = 'segmentations'  # of the pictures' directory
_CONFUSION = 'confusion'


class Segmentation:
  """Classes of all pixels of images of any size: `segment(params, examples)`.

  The model sees windows of one size only, in batches of one size, on all devices. What follows are
  products with matrices for the rows and columns, see `views`; their sizes are rounded up, so that
  images with the same `bucket` of each side and as many windows share a program. No logits leave
  the devices.

  Args:
    graphdef: static half of the segmenter.
    task: a `SegmentTask`.
    batch: windows that the model computes at a time; it is rounded up to the devices.
    devices: of this process.
  """

  def __init__(self, graphdef: nnx.GraphDef, task: Any, batch: int, devices: Sequence[Any]):
    mesh = Mesh(np.asarray(devices), ('windows',))
    self._split = NamedSharding(mesh, PartitionSpec('windows'))
    self._whole = NamedSharding(mesh, PartitionSpec())
    self._batch = -(-batch // len(devices)) * len(devices)
    self._views, self._crop = task.views, task.image_size
    self._classes = task.num_classes
    logits = of_model(graphdef, lambda model, b: task.logits(model, b['windows'], b['extent']))
    self._logits = jax.jit(logits, out_shardings=self._whole)

  def __call__(self, params: Any, examples: Sequence[Example]) -> Iterator[jax.Array]:
    """For each example its classes, (H', W') with H' >= H and W' >= W: the rest means nothing.

    They are uint8, with more than 256 classes uint16.

    Args:
      params: of the model, on all devices of this process.
      examples: with `windows`, `extent` and `image` from `Views`.
    """
    logits = self._windows(params, examples)
    for example in examples:
      size = example['image'].shape[:2]
      padded = bucket(size[0]), bucket(size[1])
      total = _zeros(*padded, self._classes, self._whole)
      for view in self._views.of(size):
        windows = tuple(next(logits) for _ in range(len(view.tops) * len(view.lefts)))
        rows, columns = (
          np.pad(matrix, ((0, side - len(matrix)), (0, 0)))
          for matrix, side in zip(views.matrices(view, self._crop, size), padded, strict=True)
        )
        total = _add_view(total, windows, rows, columns, view.weight, len(view.tops))
      yield _likeliest(total)

  def _windows(self, params: Any, examples: Sequence[Example]) -> Iterator[jax.Array]:
    """The logits (h, w, classes) of each window of all examples."""
    whole = {
      key: np.concatenate([example[key] for example in examples]) for key in ('windows', 'extent')
    }
    count = len(whole['extent'])
    for start in range(0, count, self._batch):
      real = min(self._batch, count - start)
      part = {}
      for key, value in whole.items():
        part[key] = np.zeros((self._batch, *value.shape[1:]), value.dtype)
        part[key][:real] = value[start : start + real]
      found = self._logits(params, jax.device_put(part, self._split))
      yield from (_pick(found, i) for i in range(real))


def bucket(side: int) -> int:
  """A side rounded up, to one of four sizes from one power of two to the next."""
  step = max(1 << (side.bit_length() - 1), 64) // 4
  return -(-side // step) * step


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(height: int, width: int, classes: int, place: Any) -> jax.Array:
  return jax.lax.with_sharding_constraint(jnp.zeros((height, width, classes)), place)


@jax.jit
def _pick(logits: jax.Array, index: Any) -> jax.Array:
  return logits[index]


@functools.partial(jax.jit, static_argnums=5, donate_argnums=0)
def _add_view(total, windows, rows, columns, weight, count):
  x = jnp.stack(windows)
  _, h, w, classes = x.shape
  x = x.reshape(count, -1, h, w, classes).swapaxes(1, 2).reshape(rows.shape[1], -1, classes)
  x = jnp.einsum('Hh,hwk->Hwk', rows, x, precision='highest')
  x = jnp.einsum('Ww,Hwk->HWk', columns, x, precision='highest')
  return total + weight * jax.nn.softmax(x)


@jax.jit
def _likeliest(probabilities: jax.Array) -> jax.Array:
  dtype = jnp.uint8 if probabilities.shape[-1] <= 256 else jnp.uint16
  return probabilities.argmax(axis=-1).astype(dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _confusion(found: jax.Array, labels: jax.Array, classes: int, ignore_index: int) -> jax.Array:
  return pixels.confusion(found, labels, classes, ignore_index=ignore_index)


class MeanIoU:
  """mIoU, mAcc and aAcc of a set, at the size of its label maps; leaves tables and a picture.

  They are NAME/miou and so on for the parameters, NAME/ema_miou for their average.
  """

  def __init__(self, context: Context, task: Any, source: Any, name: str, *, segment: Segmentation):
    self._context, self._task, self._source, self._name = context, task, source, name
    self._segment = segment

  def __call__(self, step: int, state: Mapping[str, Any]) -> Metrics:
    metrics = {}
    for key, prefix in (('params', ''), ('ema', 'ema_')):
      if key not in state:
        continue
      confusion = self._context.total(self._confusion(self._context.local(state[key])))
      own = miou.means(confusion)
      metrics |= {f'{self._name}/{prefix}{name}': value for name, value in own.items()}
      self._keep(step, f'{self._name}_{prefix}classes', confusion)
    return metrics

  def _confusion(self, params: Any) -> np.ndarray:
    """Of this process's examples."""
    classes, ignored = self._task.num_classes, self._task.ignore_index
    total = np.zeros((classes, classes), np.int64)
    with self._context.own_batches(self._source) as batches:
      for batch in batches:
        examples = rows(batch)
        counts = []
        for example, found in zip(examples, self._segment(params, examples), strict=True):
          own = example['label_map']  # of a type that has room for the ignored label
          labels = np.full(found.shape, ignored, own.dtype)
          labels[: own.shape[0], : own.shape[1]] = own
          counts.append(_confusion(found, labels, classes, ignored))
        total += sum(np.asarray(count, np.int64) for count in counts)
    return total

  def _keep(self, step: int, name: str, confusion: np.ndarray) -> None:
    names = segmentation_pictures.class_names(self._source, self._task.num_classes)
    views = str(self._task.views)
    found = {'classes': miou.rows(confusion, names), **miou.means(confusion), 'views': views}
    text = f'{miou.table(confusion, names)} ({views})'
    self._context.keep(step, name, text, json.dumps(found, indent=1))
    if self._context.draws:
      picture = segmentation_pictures.confusion(confusion, names)
      self._context.draw(step, f'{self._name}_{_CONFUSION}', picture)


def rows(batch: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
  """The examples of a batch of lists, without padding and broken ones."""
  keys = [key for key in batch if key not in ('mask', 'index')]
  return [{key: batch[key][i] for key in keys} for i, real in enumerate(batch['mask']) if real]


def evaluators(context: Context, task: Any) -> list[Evaluator]:
  """What a `SegmentTask` measures and draws, with one program for all sets and the pictures."""
  batch = context.setting('evaluation.batch_size')
  segment = Segmentation(context.graphdef, task, batch, context.devices)
  measure, pictures = (functools.partial(f, segment=segment) for f in (MeanIoU, _pictures))
  return of_sets(context, task, measure, pictures)


def _pictures(
  context: Context, task: Any, *, segment: Segmentation
) -> Callable[[int, Any], Metrics]:
  """Draws the same evaluation images each time: image, truth, prediction, overlay."""
  source = context.some(next(iter(context.sets.values())), context.setting('pictures.count'))
  examples = rows(context.examples(source))
  names = segmentation_pictures.class_names(source, task.num_classes)
  palette = segmentation_pictures.palette(source, task.num_classes)

  def run(step: int, state: Any) -> Metrics:
    params, shown = context.local(state['params']), []
    for example, found in zip(examples, segment(params, examples), strict=True):
      height, width = example['image'].shape[:2]
      found = np.asarray(found)[:height, :width]
      image = as_bytes(example['image'], context.setting('pictures.channels'))
      shown.append((image, example['label_map'], found))
    title = f'{context.model_name}, step {step}'
    context.draw(
      step, _NAME, segmentation_pictures.draw(shown, names, palette, title, task.ignore_index)
    )
    return {}

  return run
