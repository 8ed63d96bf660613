"""What `predict` does with a segmenter: the class of each pixel, as pictures and shares."""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from hivit_jax import cli
from hivit_jax.data import class_lists
from hivit_jax.interop import infer
from hivit_jax.tasks import segmentation, segmentation_pictures
from hivit_jax.tasks.images import as_bytes
from hivit_jax.tasks.segment import SegmentTask
from hivit_jax.tools import loaded

_BATCH = 4  # images that are in memory
_WINDOWS = 4  # that the model computes at a time


def task_of(metadata: Mapping[str, Any], model: Any, **pixels: Any) -> SegmentTask:
  """The task of weights, with the views of their run or, without one, sliding windows.

  Args:
    metadata: of the weights.
    model: the segmenter.
    **pixels: `mean` and `std`.
  """
  own = metadata.get('config', {}).get('segment', {})
  known = {'inference', 'stride', 'scales', 'mirrored'}
  options = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if k in known}
  if not options:
    options = {'inference': 'slide', 'stride': tuple(2 * side // 3 for side in model.image_size)}
  return SegmentTask(
    image_size=model.image_size,
    num_classes=model.num_classes,
    channels=model.channels,
    dtype=infer.pixels(metadata).get('dtype', 'uint8'),
    **options,
    **pixels,
  )


def colours(names: Sequence[str]) -> np.ndarray:
  """(classes, 3) uint8: those of the data set that has these classes, or some that differ."""
  for known in (class_lists.VOC, class_lists.CITYSCAPES, class_lists.ADE20K):
    if tuple(names) == known.names:
      return known.palette
  return class_lists.distinct_colours(len(names))


def pictures(path: str) -> list[str]:
  """Names of an image's pictures: classes, colours, and colours on the image."""
  stem = pathlib.Path(path).stem
  return [f'{stem}.png', f'{stem}_colour.png', f'{stem}_overlay.png']


class PixelClasses:
  """The class of each pixel of images of any size: `segment(examples)`.

  Args:
    model: the segmenter.
    task: see `task_of`.
    names: of the classes.

  Attributes:
    colours: (classes, 3) uint8.
  """

  def __init__(self, model: nnx.Module, task: SegmentTask, names: Sequence[str]):
    graphdef, params = nnx.split(model)
    self._segment = segmentation.Segmentation(graphdef, task, _WINDOWS, jax.local_devices()[:1])
    self._params, self._names = nnx.to_pure_dict(params), names
    self._views = dataclasses.replace(task.views, classes=None)
    self.colours = colours(names)

  def decode(self, data: bytes | np.ndarray) -> dict[str, np.ndarray]:
    """An example with `image` (H, W, channels) uint8, see `Views`."""
    return self._views({'image': data})

  def __call__(self, examples: Sequence[dict[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """(H, W) of each example, uint8, with more than 256 classes uint16."""
    for example, found in zip(examples, self._segment(self._params, examples), strict=True):
      height, width = example['image'].shape[:2]
      yield np.asarray(found)[:height, :width]

  def shares(self, labels: np.ndarray) -> list[dict[str, Any]]:
    """The classes in (H, W) labels with their shares of the pixels, the largest first."""
    share = np.bincount(labels.ravel(), minlength=len(self._names)) / labels.size
    best = [int(i) for i in np.argsort(-share, kind='stable') if share[i]]
    return [{'label': self._names[i], 'index': i, 'share': float(share[i])} for i in best]


def predict(
  paths: Sequence[str],
  model: nnx.Module,
  task: SegmentTask,
  names: Sequence[str],
  *,
  top: int,
  as_json: bool,
  folder: str | None,
  shown: Sequence[int] | None = None,
) -> list[str]:
  """Prints the largest classes of each image, and writes pictures if there is a folder for them.

  The pictures of NAME.jpg are NAME.png, the classes themselves, with a palette; NAME_colour.png;
  NAME_overlay.png, half image and half colours; and for all images legend.png.

  Args:
    paths: of the images.
    model: the segmenter.
    task: see `task_of`.
    names: of the classes.
    top: how many classes are printed.
    as_json: print one JSON object an image.
    folder: of the pictures; None: none are written.
    shown: channels of the image in pictures, see `Display.of`.

  Returns:
    The images that could not be read; they are named on the standard error stream.
  """
  segment = PixelClasses(model, task, names)
  palette, seen, failed = segment.colours, set(), []
  images = loaded.read(paths, segment.decode, failed)
  while batch := list(itertools.islice(images, _BATCH)):
    examples = [example for _, example in batch]
    for (path, example), labels in zip(batch, segment(examples), strict=True):
      rows = segment.shares(labels)
      seen |= {row['index'] for row in rows}
      rows = rows[:top]
      if as_json:
        print(json.dumps({'file': path, 'classes': rows}))
      else:
        print(path, *(f'  {100 * row["share"]:5.1f} %  {row["label"]}' for row in rows), sep='\n')
      if folder is not None:
        _write(folder, path, as_bytes(example['image'], shown), labels, palette)
  if folder is not None and seen:
    legend = pathlib.Path(folder) / 'legend.png'
    with cli.writing('save', str(legend)):
      segmentation_pictures.legend(names, palette, sorted(seen)).save(legend)
    print(f'wrote pictures and {legend}', file=sys.stderr)  # stdout has the classes
  return failed


def _write(
  folder: str, path: str, image: np.ndarray, labels: np.ndarray, palette: np.ndarray
) -> None:
  if len(palette) <= 256:
    indices = Image.fromarray(labels, 'P')
    indices.putpalette(palette.tobytes())
  else:
    indices = Image.fromarray(labels)
  drawn = [
    indices,
    Image.fromarray(segmentation_pictures.colour(labels, palette)),
    Image.fromarray(segmentation_pictures.overlay(image, labels, palette)),
  ]
  with cli.writing('save', folder):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for name, picture in zip(pictures(path), drawn, strict=True):
      picture.save(pathlib.Path(folder) / name)
