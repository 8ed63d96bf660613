"""What `predict` does with a detector: objects with boxes and masks, as pictures and JSON."""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from hivit_jax import cli
from hivit_jax.data import class_lists
from hivit_jax.data.decode import decode_image
from hivit_jax.tasks import detection_pictures
from hivit_jax.tasks.detect import DetectTask
from hivit_jax.tasks.detection_evaluation import SHOWN_SCORE, Detector
from hivit_jax.tasks.detection_results import Object
from hivit_jax.tools import loaded


def task_of(metadata: Mapping[str, Any], model: Any, **pixels: Any) -> DetectTask:
  """The task of weights, with the sides of evaluation images in their run or, without one, COCO's.

  Args:
    metadata: of the weights.
    model: the detector.
    **pixels: `mean` and `std`.
  """
  own = metadata.get('config', {}).get('detect', {})
  options = {key: own[key] for key in ('long_side', 'eval_short_side') if key in own}
  return DetectTask(num_classes=model.num_classes, channels=model.channels, **options, **pixels)


def known_names(count: int) -> Sequence[str]:
  """Names of classes that no file tells: COCO's where there are as many, else their numbers."""
  names = class_lists.COCO.names
  return names if len(names) == count else [str(i) for i in range(count)]


def pictures(path: str) -> list[str]:
  """The name of an image's picture."""
  return [f'{pathlib.Path(path).stem}_objects.png']


class Objects:
  """The objects in images of any size, and pictures of them: `find(image)`.

  Args:
    model: the detector.
    task: see `task_of`.
    names: of the classes.

  Attributes:
    colours: (classes, 3) uint8.
  """

  def __init__(self, model: nnx.Module, task: DetectTask, names: Sequence[str]):
    graphdef, params = nnx.split(model)
    self._detect, self._params = Detector(graphdef, task), nnx.to_pure_dict(params)
    self._names, self._channels = names, task.channels
    self.colours = class_lists.distinct_colours(len(names) + 1)[1:]  # without black

  def decode(self, data: bytes | np.ndarray) -> np.ndarray:
    """(H, W, channels) uint8, upright."""
    image = np.asarray(decode_image(data, channels=self._channels))
    return image.reshape(*image.shape[:2], self._channels)

  def __call__(self, image: np.ndarray) -> list[Object]:
    """(H, W, channels) uint8 -> the objects, best first; see `detection_results.of_batch`."""
    return self._detect(self._params, image)

  def draw(self, image: np.ndarray, found: Sequence[Object]) -> Image.Image:
    """The image with its objects whose score is at least `SHOWN_SCORE`."""
    shown = [one for one in found if one['score'] >= SHOWN_SCORE]
    canvas = np.broadcast_to(image, (*image.shape[:2], 3))
    return detection_pictures.draw(canvas, shown, self._names, self.colours)


def predict(
  paths: Sequence[str],
  model: nnx.Module,
  task: DetectTask,
  names: Sequence[str],
  *,
  top: int,
  as_json: bool,
  folder: str | None,
) -> list[str]:
  """Prints the objects of each image, and writes pictures if there is a folder for them.

  Args:
    paths: of the images, which are shown to the model upright, as EXIF says.
    model: the detector.
    task: see `task_of`.
    names: of the classes.
    top: how many objects are printed, the best first.
    as_json: print one JSON object an image instead, with all objects, and masks as run lengths.
    folder: of the pictures, which are NAME_objects.png for NAME.jpg; None: none are written.

  Returns:
    The images that could not be read; they are named on the standard error stream.
  """
  find = Objects(model, task, names)
  failed: list[str] = []
  for path, image in loaded.read(paths, find.decode, failed):
    found = find(image)
    if as_json:
      print(json.dumps({'file': path, 'objects': [_row(one, names) for one in found]}))
    else:
      print(path, *(_line(one, names) for one in found[:top]), sep='\n')
    if folder is not None:
      with cli.writing('save', folder):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        find.draw(image, found).save(pathlib.Path(folder, *pictures(path)))
  if folder is not None and len(failed) < len(paths):
    print(f'wrote pictures to {folder}', file=sys.stderr)  # stdout has the objects
  return failed


def _row(one: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
  label = one['category_id']
  return {
    'label': names[label],
    'index': label,
    **{key: one[key] for key in ('score', 'bbox', 'segmentation')},
  }


def _line(one: Mapping[str, Any], names: Sequence[str]) -> str:
  left, top, width, height = (round(value) for value in one['bbox'])
  place = f'{width}x{height} at ({left}, {top})'
  return f'  {100 * one["score"]:5.1f} %  {names[one["category_id"]]}, {place}'
