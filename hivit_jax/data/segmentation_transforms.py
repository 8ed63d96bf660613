"""From an image and its label map to arrays, as mmsegmentation 0.26 does it.

Steps of the rows of `transforms.TrainTransform`; evaluations are in `tasks.views`. Label maps equal
mmsegmentation's pixel by pixel, and so do sizes, crops, mirroring and padding. Images are resized
by PIL, not by OpenCV: enlarged, they differ by at most 1 of 255; reduced, they are smoother,
because PIL averages over all pixels and OpenCV skips some.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from hivit_jax.data import fields, transforms
from hivit_jax.data.decode import BrokenImage
from hivit_jax.data.fields import Example
from hivit_jax.errors import UserError
from hivit_jax.settings import image_size

KEYS = ('image', 'segmentation')
_DRAWS = 10  # crops that are looked at; the one after them is taken unseen
_BILINEAR = Image.Resampling.BILINEAR


def resized(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
  """Returns the (height, width) of an image that is resized to fit, its aspect ratio kept.

  Args:
    height: Of the image.
    width: Of the image.
    scale: What its sides become at most: the longer side, the shorter side, in either order.
  """
  long, short = max(scale), min(scale)
  factor = min(long / max(height, width), short / min(height, width))
  return int(height * factor + 0.5), int(width * factor + 0.5)


def nearest(size: int, source: int) -> np.ndarray:
  """Returns which of `source` pixels each of `size` pixels shows, int64 (size,), as OpenCV does.

  The place is that of the pixel's beginning, not of its centre.
  """
  return np.minimum(np.floor(np.arange(size) * (1 / (size / source))), source - 1).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class ClassMap:
  """Turns what is stored in a label map into classes.

  Attributes:
    num_classes: Of the data set.
    ignore_index: What pixels without a class have, stored and afterwards.
    reduce_zero_label: 0 has no class, and class c is stored as c + 1.
  """

  num_classes: int
  ignore_index: int = 255
  reduce_zero_label: bool = False

  def __post_init__(self):
    if not self.num_classes <= self.ignore_index <= 65535:
      raise UserError(
        f'ignore_index={self.ignore_index}: expected a number that is no class, so at least '
        f'{self.num_classes}, and at most 65535'
      )

  def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
    del rng
    labels, first = example['segmentation'], int(self.reduce_zero_label)
    present = np.flatnonzero(_counts(labels))
    # Stored number -> class, or -1 for what must not be there.
    table = np.full(max(int(present[-1]), self.ignore_index, 255) + 1, -1, np.int32)
    table[first : first + self.num_classes] = np.arange(self.num_classes)
    table[self.ignore_index] = self.ignore_index
    table[:first] = self.ignore_index
    wrong = present[table[present] < 0]
    if len(wrong):
      last = first + self.num_classes - 1
      from_one = wrong[0] == self.num_classes and not self.reduce_zero_label
      hint = '; if 0 means no class, set reduce_zero_label' if from_one else ''
      raise BrokenImage(
        f'label map: has class {wrong[0]}; the {self.num_classes} classes are {first} to {last}, '
        f'and {self.ignore_index} is ignored{hint}'
      )
    if self.ignore_index > 255:
      labels = Image.fromarray(table.astype(np.uint16)[np.asarray(labels)])
    elif labels.mode == 'L':
      labels = labels.point(table.astype(np.uint8).tolist()) if first else labels
    else:
      labels = Image.fromarray(table.astype(np.uint8)[np.asarray(labels)])
    return {**example, 'segmentation': labels}


@dataclasses.dataclass(frozen=True)
class RandomScaledCrop:
  """Resizes by a random ratio, its aspect ratio kept, and cuts a window of at most `size`.

  Windows with one class only, or with one of `max_share` of the labelled pixels, are drawn again
  up to ten times.

  Attributes:
    size: (height, width) of the window; an image that is smaller after resizing stays smaller.
    scale: What an image's longer and shorter side become at most, at the ratio 1.
    ratios: Smallest and largest ratio.
    max_share: In (0, 1]; 1: every window is taken.
    ignore_index: Of pixels without a class.
  """

  size: tuple[int, int]
  scale: tuple[int, int]
  ratios: tuple[float, float] = (0.5, 2.0)
  max_share: float = 0.75
  ignore_index: int = 255

  def __post_init__(self):
    low, high = self.ratios
    if not 0 < low <= high:
      raise UserError(f'Ratios {self.ratios!r}: expected 0 < smallest <= largest.')
    if min(self.scale) < 1:
      raise UserError(f'Scale {self.scale!r}: expected the longer and the shorter side, in pixels.')
    if not 0 < self.max_share <= 1:
      raise UserError(f'max_share={self.max_share!r}: expected more than 0, at most 1 (off).')

  def resized(self, height: int, width: int, ratio: float) -> tuple[int, int]:
    """Returns the (height, width) of an image at a ratio."""
    long, short = (int(side * ratio) for side in self.scale)
    height, width = resized(height, width, (max(1, long), max(1, short)))
    return max(1, height), max(1, width)

  def window(self, labels: np.ndarray, size: tuple[int, int], draw: Any) -> tuple[int, int]:
    """Returns the (top, left) of the window in the resized image.

    Args:
      labels: (H, W), classes of the image before it is resized.
      size: (height, width) of the resized image.
      draw: `(rows, columns) -> (top, left)`, uniform in [0, rows] and [0, columns].
    """
    rows, columns = (nearest(n, m) for n, m in zip(size, labels.shape, strict=True))
    height, width = (min(n, m) for n, m in zip(size, self.size, strict=True))
    place = draw(size[0] - height, size[1] - width)
    if self.max_share < 1:
      for _ in range(_DRAWS):
        top, left = place
        seen = labels[rows[top : top + height]][:, columns[left : left + width]]
        counts = _counts(Image.fromarray(seen), self.ignore_index + 1)
        counts[self.ignore_index] = 0
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.max_share:
          break
        place = draw(size[0] - height, size[1] - width)
    return place

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    width, height = example['image'].size
    size = self.resized(height, width, rng.uniform(*self.ratios))
    labels = np.asarray(example['segmentation'])

    def draw(rows: int, columns: int) -> tuple[int, int]:
      return int(rng.integers(rows + 1)), int(rng.integers(columns + 1))

    top, left = self.window(labels, size, draw)
    return self.cut(example, size, (top, left))

  def cut(self, example: Example, size: tuple[int, int], place: tuple[int, int]) -> Example:
    """Returns the window at a place of the image resized to (height, width)."""
    (top, left), (width, height) = place, example['image'].size
    rows = nearest(size[0], height)[top : top + self.size[0]]
    columns = nearest(size[1], width)[left : left + self.size[1]]
    y, x = height / size[0], width / size[1]
    # Resizing the window alone gives the same pixels as cutting it from the whole resized image.
    box = (left * x, top * y, (left + len(columns)) * x, (top + len(rows)) * y)
    box = (*box[:2], min(box[2], width), min(box[3], height))  # but for rounding

    def cut_image(image: Image.Image) -> Image.Image:
      return image.resize((len(columns), len(rows)), _BILINEAR, box)

    def cut_labels(labels: Image.Image) -> Image.Image:
      return Image.fromarray(np.asarray(labels)[rows][:, columns])

    return fields.per_field(example, self, {'image': cut_image, 'segmentation': cut_labels})


def _counts(labels: Image.Image, least: int = 1) -> np.ndarray:
  """How many pixels have each number, for at least so many numbers."""
  if labels.mode == 'L':  # several times as fast
    return np.array(labels.histogram())
  return np.bincount(np.asarray(labels).ravel(), minlength=least)


@dataclasses.dataclass(frozen=True)
class Pad:
  """Fills up to `size` at the right and below, and makes arrays.

  It gives `image`, (H, W, C), 0 where there is nothing; `label_map`, integers (H, W), there
  `ignore_index`; and `extent`, int32 (2,): the (height, width) of what there is. A normalised image
  has to be 0 beyond it.

  Attributes:
    size: (height, width).
    ignore_index: Of pixels without a class.
  """

  size: tuple[int, int]
  ignore_index: int = 255

  def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
    del rng
    arrays = fields.to_arrays(example)
    image, labels = arrays.pop('image'), arrays.pop('segmentation')
    return {
      **arrays,
      'image': padded(image, self.size, 0),
      'label_map': padded(labels, self.size, self.ignore_index),
      'extent': np.array(image.shape[:2], np.int32),
    }


def padded(array: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
  """Returns an array (H, W, ...) filled up to `size` with a value, at the right and below."""
  if array.shape[:2] == tuple(size):
    return array
  full = np.full((*size, *array.shape[2:]), value, array.dtype)
  full[: array.shape[0], : array.shape[1]] = array
  return full


def train_transform(
  size: transforms.Size,
  num_classes: int,
  *,
  scale: tuple[int, int],
  ratios: tuple[float, float] = (0.5, 2.0),
  max_share: float = 0.75,
  flip: bool = True,
  channels: int = 3,
  dtype: str = 'uint8',
  ignore_index: int = 255,
  reduce_zero_label: bool = False,
) -> transforms.TrainTransform:
  """Returns the augmentation of mmsegmentation, without its change of colours.

  That happens on the device, see `tasks.photometric`.

  Args:
    size: Side of the square output, or (height, width), in pixels.
    num_classes: Of the data set; other labels make an example a broken one.
    scale, ratios, max_share: See `RandomScaledCrop`.
    flip: Mirror half of the images.
    channels, dtype: Of the image, see `fields.decode`.
    ignore_index, reduce_zero_label: See `ClassMap`.

  Returns:
    A transform that gives `image`, `label_map` and `extent`, see `Pad`.

  Raises:
    UserError: A number makes no sense.
  """
  size = image_size(size, 'image_size')
  steps: list[transforms.Step] = [
    ClassMap(num_classes, ignore_index, reduce_zero_label),
    RandomScaledCrop(size, scale, ratios, max_share, ignore_index),
  ]
  if flip:
    steps.append(transforms.RandomFlip())
  return transforms.TrainTransform((*steps, Pad(size, ignore_index)), channels, KEYS, dtype)
