"""Images with their objects: decoded, mirrored, resized and cropped as mmdetection does.

Boxes and bitmaps equal mmdetection's, and so do images but for one grey level in one pixel of 250:
they are resized without antialiasing, in OpenCV's integers. Masks stay as they are stored; a scene
knows which of their rows and columns it shows, so that only what is needed of them is ever copied.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hivit_jax.data import coco
from hivit_jax.data.decode import BrokenImage, decode_image, decode_label_map
from hivit_jax.errors import UserError

Size = tuple[int, int]  # (height, width) in pixels

_BLOCK = 32  # rows of an image that are resized at a time: few enough for a core's cache


@dataclasses.dataclass(frozen=True)
class Scene:
  """An image with its objects.

  Attributes:
    image: (H, W, channels) uint8.
    boxes: (n, 4) float32.
    labels: (n,) int32.
    stored: (n, h, w) uint8 of 0 and 1, masks before any change of geometry.
    crowd: (n,) bool, groups that nobody told apart.
    rows, columns: (H,) and (W,), of the stored masks, that the image shows; by default all.
  """

  image: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  stored: np.ndarray
  crowd: np.ndarray
  rows: Any = ...
  columns: Any = ...

  @property
  def size(self) -> Size:
    """(height, width) in pixels."""
    return self.image.shape[0], self.image.shape[1]

  @property
  def masks(self) -> np.ndarray:
    """(n, H, W) uint8 of 0 and 1."""
    return self.stored[:, self.rows][:, :, self.columns]

  def mask(self, index: int, rows: slice, columns: slice) -> np.ndarray:
    """A part of the mask of one object."""
    part = self.shown(rows, columns)
    return self.stored[index][part.rows][:, part.columns]

  def shown(self, rows: Any, columns: Any, **changed: np.ndarray) -> 'Scene':
    """The scene with some rows and columns (indices or slices) of its masks, and other changes."""
    height, width = self.stored.shape[1:]
    rows, columns = np.arange(height)[self.rows][rows], np.arange(width)[self.columns][columns]
    return dataclasses.replace(self, rows=rows, columns=columns, **changed)

  @classmethod
  def without_objects(cls, image: np.ndarray) -> 'Scene':
    """An image alone."""
    none = np.zeros(0)
    bitmaps = np.zeros((0, *image.shape[:2]), np.uint8)
    return cls(image, none.reshape(0, 4), none.astype(np.int32), bitmaps, none.astype(bool))

  def only(self, keep: np.ndarray) -> 'Scene':
    """The scene with some of its objects, (n,) bool."""
    fields = {name: getattr(self, name)[keep] for name in ('boxes', 'labels', 'stored', 'crowd')}
    return dataclasses.replace(self, **fields)


def scene(example: Mapping[str, Any], channels: int = 3) -> Scene:
  """Decodes an example.

  Args:
    example: `image`, and `objects` with `boxes` and `classes`; with `masks`, run lengths or
      polygons, or else a map `instances` that is i + 1 where object i is; and perhaps `crowd`.
      They lie on the pixels as they are stored, whatever EXIF says, of an image of `size`.
    channels: of the image.

  Raises:
    BrokenImage: image, masks or map are damaged, or differ in size.
    UserError: a field is missing.
  """
  if 'objects' not in example:
    raise UserError(f"there are no 'objects' to find; the data set has: {', '.join(example)}")
  objects = example['objects']
  picture = pixels(example, channels)
  size, count = picture.shape[:2], len(objects['classes'])
  if 'masks' in objects:
    try:
      found = [coco.decode(segmentation, size) for segmentation in objects['masks']]
    except ValueError as error:
      raise BrokenImage(f'a mask is damaged: {error}') from error
    bitmaps = np.stack(found) if found else np.zeros((0, *size), np.uint8)
  elif 'instances' in example:
    instances = np.asarray(decode_label_map(example['instances']))
    bitmaps = (instances == np.arange(1, count + 1)[:, None, None]).astype(np.uint8)
  else:
    raise UserError("the objects have neither 'masks' nor is there a map 'instances' of them")
  if bitmaps.shape[1:] != size:
    height, width = bitmaps.shape[1:]
    raise BrokenImage(f'the image has {size[1]}x{size[0]} pixels, its masks {width}x{height}')
  return Scene(
    picture,
    np.asarray(objects['boxes'], np.float32).reshape(-1, 4),
    np.asarray(objects['classes'], np.int32),
    bitmaps,
    np.asarray(objects.get('crowd', np.zeros(count)), bool),
  )


def pixels(example: Mapping[str, Any], channels: int = 3) -> np.ndarray:
  """(H, W, channels) uint8, as stored; raises `BrokenImage` unless that is the example's `size`."""
  image = decode_image(example['image'], channels=channels, upright=False)
  known = example.get('size')
  if known is not None and (image.height, image.width) != tuple(known):
    height, width = known
    upright = decode_image(example['image'], channels=channels)
    turned = ' (EXIF turns it)' if (upright.height, upright.width) == tuple(known) else ''
    raise BrokenImage(
      f'the image has {image.width}x{image.height} pixels{turned}, by its annotations '
      f'{width}x{height}'
    )
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array


def mirror(scene: Scene) -> Scene:
  """Swaps left and right."""
  x1, y1, x2, y2 = scene.boxes.T
  width = np.float32(scene.size[1])
  boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
  return scene.shown(slice(None), slice(None, None, -1), image=scene.image[:, ::-1], boxes=boxes)


def resize(scene: Scene, size: Size) -> Scene:
  """Resizes the image bilinearly, masks to the nearest pixel."""
  height, width = scene.size
  ratio = np.array([size[1] / width, size[0] / height] * 2, np.float32)
  boxes = (scene.boxes * ratio).clip(0, np.array([size[1], size[0]] * 2, np.float32))
  rows, columns = (_nearest(new, old) for new, old in zip(size, scene.size, strict=True))
  return scene.shown(rows, columns, image=_bilinear(scene.image, size), boxes=boxes)


def _nearest(new: int, old: int) -> np.ndarray:
  """The pixel of the source that each shows: that of its beginning, rounded as by OpenCV."""
  return np.minimum(np.floor(np.arange(new) * (1 / (new / old))), old - 1).astype(np.int64)


def _bilinear(image: np.ndarray, size: Size) -> np.ndarray:
  """(H, W, channels) uint8 -> (*size, channels), the four nearest pixels weighed, as by OpenCV.

  It computes in integers: weights have 11 bits, of which sums between the axes lose 4.
  """
  if size == image.shape[:2]:
    return image
  (top, bottom, rows), (left, right, columns) = (
    _neighbours(new, old) for new, old in zip(size, image.shape[:2], strict=True)
  )
  # In place wherever possible: memory is what takes the time.
  wide = image.astype(np.int32)
  across, second = wide.take(left, axis=1), wide.take(right, axis=1)
  across *= columns[0][:, None]
  second *= columns[1][:, None]
  across += second
  across >>= 4
  resized = np.empty((*size, image.shape[2]), np.uint8)
  for start in range(0, size[0], _BLOCK):
    block = slice(start, start + _BLOCK)
    first, second = across.take(top[block], axis=0), across.take(bottom[block], axis=0)
    first *= rows[0][block, None, None]
    second *= rows[1][block, None, None]
    first >>= 16
    second >>= 16
    first += second
    first += 2
    first >>= 2
    resized[block] = first
  return resized


def _neighbours(new: int, old: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
  """Of each pixel of the resized axis: the two of the source around it, and their weights."""
  place = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1).astype(np.float32)
  first = np.floor(place).astype(np.int64)
  share = place - first.astype(np.float32)
  weights = tuple(np.rint(w * 2048).astype(np.int32) for w in (1 - share, share))
  return first, np.minimum(first + 1, old - 1), weights


def crop(scene: Scene, size: Size, offset: tuple[int, int]) -> Scene:
  """Cuts a rectangle out; objects whose boxes are outside go.

  Args:
    scene: what to cut.
    size: height and width of the rectangle.
    offset: its upper left corner (top, left).
  """
  (height, width), (top, left) = size, offset
  rows, columns = slice(top, top + height), slice(left, left + width)
  boxes = scene.boxes - np.array([left, top, left, top], np.float32)
  boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
  cut = scene.shown(rows, columns, image=scene.image[rows, columns], boxes=boxes)
  return cut.only((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
