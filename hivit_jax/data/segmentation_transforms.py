"""From an image and its label map to arrays, as mmsegmentation 0.26 does it.

Steps of the rows of `transforms.TrainTransform`, and the transform of evaluation. Label maps equal
mmsegmentation's pixel by pixel, and so do sizes, crops, mirroring and padding. Images are resized
by PIL, not by OpenCV: enlarged, they differ by at most 1 of 255; reduced, they are smoother,
because PIL averages over all pixels and OpenCV skips some.
"""

import dataclasses
from collections.abc import Mapping
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
_ENDLESS = 1 << 30  # pixels
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
    stored = np.asarray(example['segmentation'])
    first = int(self.reduce_zero_label)
    # One look-up for all: stored number -> class, or -1 for what must not be there.
    table = np.full(max(int(stored.max()), self.ignore_index) + 1, -1, np.int32)
    table[first : first + self.num_classes] = np.arange(self.num_classes)
    table[self.ignore_index] = self.ignore_index
    table[:first] = self.ignore_index
    present = np.flatnonzero(np.bincount(stored.ravel(), minlength=len(table)))
    wrong = present[table[present] < 0]
    if len(wrong):
      last = first + self.num_classes - 1
      from_one = wrong[0] == self.num_classes and not self.reduce_zero_label
      hint = '; if 0 means no class, set reduce_zero_label' if from_one else ''
      raise BrokenImage(
        f'label map: has class {wrong[0]}; the {self.num_classes} classes are {first} to {last}, '
        f'and {self.ignore_index} is ignored{hint}'
      )
    dtype = np.uint8 if self.ignore_index < 256 else np.uint16
    return {**example, 'segmentation': Image.fromarray(table.astype(dtype)[stored])}


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
    return tuple(max(1, side) for side in resized(height, width, (max(1, long), max(1, short))))

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
        counts = np.bincount(seen.ravel(), minlength=self.ignore_index + 1)
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


@dataclasses.dataclass(frozen=True)
class Pad:
  """Fills up to `size` at the right and below, and makes arrays.

  It gives `image`, uint8 (H, W, C), 0 where there is nothing; `label_map`, integers (H, W), there
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
    channels: Of the image: 3 (RGB) or 1 (greyscale).
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
  return transforms.TrainTransform((*steps, Pad(size, ignore_index)), channels, KEYS)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """Resizes an image, its aspect ratio kept, for measuring at the label map's own size.

  It gives `image`, uint8 (h, w, C), and `label_map`, integers (H, W). With a canvas, both are
  filled up to it and there are `extent` and `label_extent` as well, see `Pad`; without one, shapes
  differ from example to example.

  Attributes:
    classes: What the stored labels mean.
    scale: What the longer and the shorter side become at most; None: images keep their size.
    short: If given, the shorter side becomes this or that of `scale`, whichever is more, and the
      longer side follows, however long: a model that slides a window needs it covered.
    canvas: (height, width) that every image and label map fits into; None: no padding.
    channels: Of the image: 3 (RGB) or 1 (greyscale).
  """

  classes: ClassMap
  scale: tuple[int, int] | None = None
  short: int | None = None
  canvas: tuple[int, int] | None = None
  channels: int = 3

  @property
  def ragged(self) -> bool:
    """Whether shapes differ between examples."""
    return self.canvas is None

  def resized(self, height: int, width: int) -> tuple[int, int]:
    """Returns the (height, width) of a resized image."""
    if self.scale is None:
      return height, width
    if self.short is None:
      return resized(height, width, self.scale)
    return resized(height, width, (_ENDLESS, max(self.short, min(self.scale))))

  def __call__(self, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
    decoded = self.classes(fields.decode(example, KEYS, self.channels))
    image, labels = decoded['image'], decoded['segmentation']
    height, width = self.resized(image.height, image.width)
    if (width, height) != image.size:
      image = image.resize((width, height), _BILINEAR)
    arrays = fields.to_arrays({'image': image, 'label_map': labels})
    if self.canvas is None:
      return arrays
    for name, array in list(arrays.items()):
      if any(n > m for n, m in zip(array.shape, self.canvas, strict=False)):
        sizes = [f'{w}x{h}' for h, w in (array.shape[:2], self.canvas)]
        raise UserError(
          f'an evaluation image has {sizes[0]} pixels, more than the {sizes[1]} that all are '
          'padded to; give a larger canvas'
        )
      value = 0 if name == 'image' else self.classes.ignore_index
      arrays[name] = padded(array, self.canvas, value)
      arrays['extent' if name == 'image' else 'label_extent'] = np.array(array.shape[:2], np.int32)
    return arrays
