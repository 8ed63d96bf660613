"""From an image and its objects to arrays: mirrored, resized, cropped, padded, as mmdetection does.

At the end each mask becomes a crop to its box. What happens to an image is a function of its size
and of eight random numbers, so that the size of the result is known before the image is read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hivit_jax.data import coco_files, masks
from hivit_jax.data.scenes import Scene, Size, crop, mirror, pixels, resize, scene
from hivit_jax.errors import UserError

DRAWS = 8  # random numbers of an image


def fitted_sizes(sizes: np.ndarray, short: Any, long: Any) -> np.ndarray:
  """`fitted` of many sizes: (n, 2) -> (n, 2) integers; the bounds are numbers or (n,)."""
  factor = np.minimum(long / sizes.max(axis=1), short / sizes.min(axis=1))
  return np.maximum((sizes * factor[:, None] + 0.5).astype(np.int64), 1)


def fitted(size: Size, short: int, long: int) -> Size:
  """The size of an image after it is resized to fit these bounds, with its aspect ratio kept.

  No side becomes less than a pixel.
  """
  height, width = fitted_sizes(np.array([size]), short, long)[0]
  return int(height), int(width)


@dataclasses.dataclass(frozen=True)
class Chain:
  """What happens to one image: mirrored or not; resized and cropped or not; resized.

  Attributes:
    flip: left and right are swapped.
    short, long: bounds of the last resizing, see `fitted`.
    first: bounds (short, long) of a resizing before, followed by a crop; not only whole numbers.
    crop: height and width of the crop.
    offset: its upper left corner.
  """

  flip: bool
  short: int
  long: int
  first: tuple[float, float] | None = None
  crop: Size = (0, 0)
  offset: tuple[int, int] = (0, 0)

  def size(self, size: Size) -> Size:
    """The size of what it makes of an image of a size."""
    return fitted(self.crop if self.first else size, self.short, self.long)

  def __call__(self, scene: Scene) -> Scene:
    if self.flip:
      scene = mirror(scene)
    if self.first:
      scene = resize(scene, fitted(scene.size, *self.first))
      scene = crop(scene, self.crop, self.offset)
    return resize(scene, fitted(scene.size, self.short, self.long))


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Draws a `Chain` for an image: half of the images are resized only, half cropped before.

  Attributes:
    short: what the shorter side becomes at most, one of them.
    long: what the longer side becomes at most.
    first: the same as `short` for the resizing before a crop; empty: no image is cropped.
    crop: least and most of a crop's sides, in pixels.
    flip: half of the images are mirrored.
  """

  short: tuple[int, ...]
  long: int
  first: tuple[int, ...] = ()
  crop: tuple[int, int] = (384, 600)
  flip: bool = True

  def draw(self, size: Size, draws: np.ndarray) -> Chain:
    """A chain for an image.

    Args:
      size: of the image; nothing else of it matters.
      draws: (DRAWS,) in [0, 1).
    """
    cropped, short, first, sides, corners = self._many(np.array([size]), draws[None])
    flip = self.flip and bool(draws[0] < 0.5)
    if not cropped[0]:
      return Chain(flip, int(short[0]), self.long)
    (height, width), (top, left) = sides[0].tolist(), corners[0].tolist()
    return Chain(
      flip, int(short[0]), self.long, (int(first[0]), self.long), (height, width), (top, left)
    )

  def sizes(self, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """What images become: (n, 2) sizes and (n, DRAWS) numbers -> (n, 2), equal to `Chain.size`."""
    cropped, short, _, sides, _ = self._many(sizes, draws)
    return fitted_sizes(np.where(cropped[:, None], sides, sizes), short, self.long)

  def _many(self, sizes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, ...]:
    """Which are cropped (n,), bounds (n,) of the last and of the first resizing, crops (n, 2), and
    their upper left corners (n, 2)."""

    def chosen(options: tuple[int, ...], column: int) -> np.ndarray:
      return np.array(options)[(draws[:, column] * len(options)).astype(np.int64)]

    short = chosen(self.short, 2)
    if not self.first:
      none = np.zeros_like(sizes)
      return np.zeros(len(sizes), bool), short, short, none, none
    first = chosen(self.first, 3)
    whole = fitted_sizes(sizes, first, self.long)
    least, most = (np.minimum(whole, bound) for bound in self.crop)
    sides = least + (draws[:, 4:6] * (most - least + 1)).astype(np.int64)
    corners = (draws[:, 6:8] * (whole - sides + 1)).astype(np.int64)
    return draws[:, 1] < 0.5, short, first, sides, corners


@dataclasses.dataclass(frozen=True)
class ScaleJitter:
  """Draws a `Chain` of large-scale jitter (arXiv 2012.07177), as ViTDet is trained with.

  An image is resized to fit into a square, times a random factor, and cut to the square.

  Attributes:
    scale: least and most of the factor.
    side: of the square, in pixels.
    flip: half of the images are mirrored.
  """

  scale: tuple[float, float]
  side: int
  flip: bool = True

  def draw(self, size: Size, draws: np.ndarray) -> Chain:
    """See `Augmentation.draw`."""
    bounds, whole, cut = self._many(np.array([size]), draws[None])
    offset = (draws[2] * (whole[0] - cut[0] + 1)).astype(np.int64)
    (height, width), (top, left) = cut[0].tolist(), offset.tolist()
    # The last resizing changes nothing.
    return Chain(
      self.flip and bool(draws[0] < 0.5), min(height, width), max(height, width),
      (float(bounds[0]),) * 2, (height, width), (top, left),
    )  # fmt: skip

  def sizes(self, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """See `Augmentation.sizes`."""
    return self._many(sizes, draws)[2]

  def _many(self, sizes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, ...]:
    """Longer sides (n,) at most, and what images become by resizing and by cutting (n, 2)."""
    least, most = self.scale
    bounds = self.side * (least + (most - least) * draws[:, 1])
    whole = fitted_sizes(sizes, bounds, bounds)
    return bounds, whole, np.minimum(whole, self.side)


def to_arrays(scene: Scene, canvas: Size, slots: int) -> dict[str, np.ndarray]:
  """Arrays of fixed shape, as `tasks.detect` describes them; crowds and objects of no use go.

  Args:
    scene: no larger than the canvas.
    canvas: height and width of the result.
    slots: for objects; of more of them, the largest stay.

  Raises:
    UserError: the scene is larger than the canvas.
  """
  height, width = scene.size
  if height > canvas[0] or width > canvas[1]:
    raise UserError(
      f'an image has become {height}x{width} pixels, more than the {canvas[0]}x{canvas[1]} of its '
      'canvas (config.image_size, config.detect.buckets); enlarge that, or reduce the sides that '
      'images are resized to'
    )
  scene = scene.only(coco_files.learnable(scene.boxes, scene.crowd))
  areas = np.prod(scene.boxes[:, 2:] - scene.boxes[:, :2], axis=1)
  largest = np.sort(np.argsort(-areas, kind='stable')[:slots])
  scene = scene.only(np.isin(np.arange(len(areas)), largest))
  count = len(scene.labels)
  arrays = {
    'image': np.zeros((*canvas, scene.image.shape[2]), np.uint8),
    'size': np.array([height, width], np.int32),
    'boxes': np.zeros((slots, 4), np.float32),
    'labels': np.zeros(slots, np.int32),
    'exists': np.arange(slots) < count,
    'masks': np.zeros((slots, masks.CROP, masks.CROP), np.uint8),
  }
  arrays['image'][:height, :width] = scene.image
  arrays['boxes'][:count], arrays['labels'][:count] = scene.boxes, scene.labels
  for i, box in enumerate(scene.boxes):
    rows, columns = masks.touched(box, scene.size)
    corner = np.array([columns.start, rows.start] * 2)
    arrays['masks'][i] = masks.crop(scene.mask(i, rows, columns), box - corner)
  return arrays


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """`(example, rng) -> arrays`: decodes, augments, pads; see `to_arrays`.

  An order may give it the `shape` of the canvas and the `draws` that decide, instead of the rng.

  Attributes:
    augmentation: decides what happens.
    canvas: height and width of the arrays without an order that knows better.
    slots: for objects.
    channels: of the image.
  """

  augmentation: Augmentation | ScaleJitter
  canvas: Size
  slots: int = 100
  channels: int = 3

  def __call__(
    self,
    example: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    shape: Size | None = None,
    draws: np.ndarray | None = None,
  ) -> dict[str, np.ndarray]:
    decoded = scene(example, self.channels)
    draws = rng.random(DRAWS) if draws is None else draws
    chain = self.augmentation.draw(decoded.size, draws)
    return to_arrays(chain(decoded), shape or self.canvas, self.slots)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """`example -> arrays`: `image`, `size` and `original`, the (2,) size before resizing.

  Attributes:
    short, long: see `fitted`.
    canvas: height and width of the arrays.
    channels: of the image.
  """

  short: int
  long: int
  canvas: Size
  channels: int = 3

  def size(self, size: Size) -> Size:
    """What an image of a size becomes."""
    return fitted(size, self.short, self.long)

  def __call__(
    self, example: Mapping[str, Any], *, shape: Size | None = None
  ) -> dict[str, np.ndarray]:
    picture = pixels(example, self.channels)
    size = picture.shape[0], picture.shape[1]
    resized = resize(Scene.without_objects(picture), self.size(size))
    arrays = to_arrays(resized, shape or self.canvas, 0)
    return {
      'image': arrays['image'],
      'size': arrays['size'],
      'original': np.array(size, np.int32),
    }
