"""Detectors on images of any size: COCO's measures, results files, pictures."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from hivit_jax.data import scenes
from hivit_jax.data.decode import BrokenImage
from hivit_jax.data.stream import UNREADABLE
from hivit_jax.tasks import detection_pictures, detection_results, segmentation_pictures
from hivit_jax.tasks.evaluators import Collected, Context, Evaluator, Metrics, of_model, of_sets

SHOWN_SCORE = 0.3  # of detections in pictures, at least
_SIDES = 128  # pixels: canvases of single images have sides that are multiples of it
_NAME = 'detections'  # of the pictures' directory


def canvas_of(size: tuple[int, int]) -> tuple[int, int]:
  """The canvas of a single image that has become (height, width)."""
  height, width = (-(-side // _SIDES) * _SIDES for side in size)
  return height, width


class Detector:
  """Detections in one image of any size: `detect(params, image)`.

  Args:
    graphdef: static half of the detector.
    task: a `DetectTask`.
  """

  def __init__(self, graphdef: nnx.GraphDef, task: Any):
    self._graphdef, self._transform = graphdef, task.input(train=False)
    self._found = jax.jit(of_model(graphdef, task.detections))

  def __call__(self, params: Any, image: np.ndarray) -> list[detection_results.Object]:
    """(H, W, channels) uint8 -> the objects, best first; see `detection_results.of_batch`."""
    model = nnx.merge(self._graphdef, params)
    if model.any_canvas:
      # Few canvases, so that few programs are compiled; the result does not depend on them.
      height, width = canvas_of(self._transform.size(image.shape[:2]))
    else:
      height, width = model.image_size
    row = self._transform({'image': image}, shape=(height, width))
    found = self._found(params, {key: value[None] for key, value in row.items()})
    return detection_results.of_batch(jax.device_get(found))[0]


class Measured:
  """COCO's numbers of a set, as metrics, as text and JSON, and the detections in results files.

  Metrics are NAME/box_ap, NAME/mask_ap50, ... Numbers with nothing to measure, such as those for
  large objects in a set without any, are left out.
  """

  def __init__(self, context: Context, task: Any, source: Any, name: str):
    self._context, self._source, self._name = context, source, name
    self._truth = detection_results.Truth(source, task.channels)
    self._collected = Collected(
      context, source, task.detections, self._finish, name=name, host=detection_results.of_batch
    )
    self._left: list[tuple[detection_results.Report, np.ndarray, np.ndarray]] = []
    self._step: int | None = None

  def __call__(self, step: int, state: Mapping[str, Any]) -> Metrics:
    self._step = None  # a signal may come
    self._left.clear()
    metrics = self._collected(step, state)
    self._step = step
    # Parameters come first, then their average.
    for prefix, (report, detections, index) in zip(('', 'ema_'), self._left, strict=False):
      name = f'{self._name}_{prefix}'
      data = json.dumps({**report.metrics, 'classes': report.categories}, indent=1)
      self._context.keep(step, f'{name}detections', report.text, data)
      ids = [self._truth.of_example(int(i))[2] for i in index]
      categories = getattr(self._source, 'category_ids', None)
      for kind, plural in (('box', 'boxes'), ('mask', 'masks')):
        rows = detection_results.rows(detections, ids, categories, kind)
        self._context.store(f'{name}{plural}.json', json.dumps(rows))
    return metrics

  def found(self, step: int) -> dict[int, list[detection_results.Object]] | None:
    """The objects in every example by its position; None if this step was not measured last."""
    if self._step != step:
      return None
    _, detections, index = self._left[0]  # of the parameters
    return dict(zip(index.tolist(), detections, strict=True))

  def _finish(self, detections: np.ndarray, index: np.ndarray) -> Metrics:
    report = self._truth.measure(detections, index)
    self._left.append((report, detections, index))
    return {key: value for key, value in report.metrics.items() if value >= 0}


def evaluators(context: Context, task: Any) -> list[Evaluator]:
  """What a `DetectTask` measures and draws."""
  measured: list[Measured] = []

  def measure(*what: Any) -> Measured:
    measured.append(Measured(*what))
    return measured[-1]

  def pictures(context: Context, task: Any) -> Callable[[int, Any], Metrics]:
    return _pictures(context, task, measured[0] if measured else None)

  return of_sets(context, task, measure, pictures)


def _pictures(
  context: Context, task: Any, measured: Measured | None
) -> Callable[[int, Any], Metrics]:
  """Draws the same evaluation images each time: what there is, and what is found.

  What `measured` has just found in them is not computed again, nor compiled.
  """
  source = context.some(next(iter(context.sets.values())), context.setting('pictures.count'))
  detect = Detector(context.graphdef, task)
  truth = detection_results.Truth(source, task.channels)
  names = segmentation_pictures.class_names(source, task.num_classes)
  palette = segmentation_pictures.palette(source, task.num_classes)

  def run(step: int, state: Any) -> Metrics:
    known = measured and measured.found(step)
    params = context.here(state['params']) if known is None else {}
    if params is None:
      return {}
    pairs = []
    for i in range(len(source)):
      try:
        image = scenes.pixels(source[i], task.channels)
        objects = truth.of_example(i)[1]
      except (BrokenImage, *UNREADABLE):  # an evaluation counts and names it
        continue
      every = detect(params, image) if known is None else known.get(int(source.indices[i]), [])
      found = [one for one in every if one['score'] >= SHOWN_SCORE]
      shown = np.broadcast_to(image, (*image.shape[:2], 3))
      draw = detection_pictures.draw
      pairs.append((draw(shown, objects, names, palette), draw(shown, found, names, palette)))
    if pairs:
      title = f'{context.model_name}, step {step}'
      heads = 'truth', f'found, scores from {SHOWN_SCORE}'
      context.draw(step, _NAME, detection_pictures.sheet(pairs, title, heads))
    return {}

  return run
