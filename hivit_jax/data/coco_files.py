"""Annotations in COCO's JSON format: read, checked, and kept in few arrays."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hivit_jax.data import coco
from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)

_LISTS = ('images', 'annotations', 'categories')
_SHOWN = 3  # examples in a message
_LEARNT = 'masks are learnt from it'


@dataclasses.dataclass(frozen=True)
class Annotations:
  """The contents of a file of annotations: n images by file name, and their objects.

  Attributes:
    class_names: names of the categories in the order of their ids; labels are indices into it.
    category_ids: their ids.
    files: file name of each image.
    image_ids: (n,) int64.
    scenes: (n, 3) int32, see `base.Source`.
  """

  class_names: tuple[str, ...]
  category_ids: tuple[int, ...]
  files: list[str]
  image_ids: np.ndarray
  scenes: np.ndarray
  # Of all objects, image by image: the rows of image i end at _ends[i]. One blob of text instead of
  # a million lists: it is pickled to worker processes in no time.
  _objects: Mapping[str, np.ndarray]
  _ends: np.ndarray
  _masks: bytes
  _mask_ends: np.ndarray

  def __len__(self) -> int:
    return len(self.files)

  def of_image(self, index: int) -> dict[str, Any]:
    """`size`, `image_id` and `objects` of an example, see `base.Source`."""
    rows = _part(self._ends, index)
    text = self._masks[_part(self._mask_ends, index)]
    objects: dict[str, Any] = {key: values[rows] for key, values in self._objects.items()}
    objects['masks'] = json.loads(text)
    return {
      'image_id': int(self.image_ids[index]),
      'size': self.scenes[index, :2],
      'objects': objects,
    }


def _part(ends: np.ndarray, index: int) -> slice:
  return slice(int(ends[index - 1]) if index else 0, int(ends[index]))


def read(path: str, text: str | bytes | None = None) -> Annotations:
  """Reads a file of annotations.

  Objects without area, outside of their image, or without a polygon of three points are left out,
  which the log says with their number.

  Args:
    path: of the file; for messages alone if there is a text.
    text: what is in it.

  Raises:
    UserError: the file is not in COCO's format, or its ids or sizes do not fit together.
  """
  content = _parsed(path, text)
  categories = sorted(_by_id(path, content, 'categories', ('name',)).items())
  images = _by_id(path, content, 'images', ('file_name', 'height', 'width'))
  label_of = {number: label for label, (number, _) in enumerate(categories)}
  owned: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
  _by_id(path, content, 'annotations', ())  # pycocotools looks them up by id
  useless: list[str] = []
  for annotation in content['annotations']:
    for key, known in (('image_id', images), ('category_id', label_of)):
      number = annotation.get(key)
      if not _finite(number) or number not in known:
        kind = 'images' if key == 'image_id' else 'categories'
        raise _wrong(path, annotation, key, f'which is not among the {kind}')
    image = images[annotation['image_id']]
    own = _object(path, annotation, image)
    if own is None:
      useless.append(f'annotation {annotation["id"]} of {image["file_name"]}')
    else:
      owned[image['id']].append({**own, 'classes': label_of[annotation['category_id']]})
  if useless and not any(annotation['segmentation'] for annotation in content['annotations']):
    raise UserError(f'{path}: no object has a mask (segmentation is empty), and {_LEARNT}')
  if useless:
    _log.warning(
      '%s: %d of %d objects have no area within their image and are left out: %s',
      path, len(useless), len(content['annotations']), _some(useless),
    )  # fmt: skip
  ordered = sorted(images.values(), key=lambda image: image['file_name'])
  return _packed(categories, ordered, [owned[image['id']] for image in ordered])


def _parsed(path: str, text: str | bytes | None) -> dict[str, Any]:
  try:
    if text is None:
      with open(path, 'rb') as file:
        text = file.read()
    content = json.loads(text)
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  except ValueError as error:
    raise UserError(f'{path} is not JSON, or only a part of it: {error}') from None
  if not isinstance(content, dict):
    raise UserError(f'{path} holds a list, such as of results, and no annotations in COCO format')
  for key in _LISTS:
    rows = content.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
      raise UserError(
        f'{path} is not in COCO format: it has no list {key!r} (of {", ".join(_LISTS)})'
      )
  return content


def _by_id(
  path: str, content: Mapping[str, Any], kind: str, keys: Sequence[str]
) -> dict[int, dict[str, Any]]:
  """The rows of a list by their id, checked to have some keys, names among them unique."""
  found: dict[int, dict[str, Any]] = {}
  names: set[str] = set()
  for place, row in enumerate(content[kind]):
    number = row.get('id')
    if not _whole(number):
      raise UserError(f'{path}: {kind}[{place}] has the id {number!r}; expected a whole number')
    if number in found:
      raise UserError(f'{path}: two of the {kind} have the id {number}')
    for key in keys:
      value = row.get(key)
      text = key not in ('height', 'width')
      if not (isinstance(value, str) and value if text else _whole(value) and value > 0):
        expected = 'a text' if text else 'a number of pixels'
        raise UserError(f'{path}: {key}={value!r} of id {number} in {kind}: expected {expected}')
      if text and value in names:
        raise UserError(f'{path}: two of the {kind} have the {key} {value!r}')
      if text:
        names.add(value)
    found[number] = row
  if not found and kind != 'annotations':
    raise UserError(f'{path} has no {kind}')
  return found


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _object(
  path: str, annotation: Mapping[str, Any], image: Mapping[str, Any]
) -> dict[str, Any] | None:
  """An object as our examples have it, but for its class; None if there is nothing of it."""
  box = annotation.get('bbox')
  if not (isinstance(box, list) and len(box) == 4 and all(map(_finite, box))):
    raise _wrong(path, annotation, 'bbox', 'expected [left, top, width, height] in pixels')
  left, top, width, height = box
  if width <= 0 or height <= 0 or left >= image['width'] or top >= image['height']:
    return None
  if left + width <= 0 or top + height <= 0:
    return None
  size = image['height'], image['width']
  mask = _mask(path, annotation, size)
  if mask is None:
    return None
  pixels = annotation.get('area')
  if not _finite(pixels):
    pixels = coco.area(coco.run_lengths(mask, size), size)
  return {
    'boxes': (left, top, left + width, top + height),
    'area': pixels,
    'crowd': bool(annotation.get('iscrowd', 0)),
    'masks': mask,
  }


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and abs(value) < float('inf')


def _mask(path: str, annotation: Mapping[str, Any], size: tuple[int, int]) -> Any:
  """Polygons of three points or more, or run lengths; None if there are none."""
  segmentation = annotation.get('segmentation')
  if isinstance(segmentation, dict):
    counts = segmentation.get('counts')
    if segmentation.get('size') != list(size):
      height, width = size
      raise _wrong(path, annotation, 'segmentation', f'of an image of size [{height}, {width}]')
    if isinstance(counts, str) or (
      isinstance(counts, list) and all(map(_whole, counts)) and sum(counts) == size[0] * size[1]
    ):
      return segmentation
  elif isinstance(segmentation, list) and all(
    isinstance(part, list) and all(map(_finite, part)) for part in segmentation
  ):
    return [part for part in segmentation if len(part) >= 6 and len(part) % 2 == 0] or None
  if segmentation is None:
    raise UserError(f'{path}: annotation {annotation["id"]} has no segmentation, and {_LEARNT}')
  raise _wrong(path, annotation, 'segmentation', 'expected polygons [[x, y, ...], ...] or RLE')


def _wrong(path: str, annotation: Mapping[str, Any], key: str, why: str) -> UserError:
  value = repr(annotation.get(key))
  value = value if len(value) <= 60 else f'{value[:57]}...'
  return UserError(f'{path}: annotation {annotation["id"]} has {key}={value}, {why}')


def _packed(
  categories: Sequence[tuple[int, dict[str, Any]]],
  images: Sequence[Mapping[str, Any]],
  owned: Sequence[Sequence[Mapping[str, Any]]],
) -> Annotations:
  def column(key: str, dtype: Any, *shape: int) -> np.ndarray:
    return np.array([row[key] for rows in owned for row in rows], dtype).reshape(-1, *shape)

  objects = {
    'boxes': column('boxes', np.float32, 4),
    'classes': column('classes', np.int64),
    'area': column('area', np.float32),
    'crowd': column('crowd', bool),
  }
  ends = np.cumsum([len(rows) for rows in owned], dtype=np.int64)
  masks = [json.dumps([row['masks'] for row in rows]).encode() for rows in owned]
  useful = learnable(objects['boxes'], objects['crowd'])
  counts = [int(useful[_part(ends, i)].sum()) for i in range(len(owned))]
  sizes = [(image['height'], image['width']) for image in images]
  return Annotations(
    tuple(category['name'] for _, category in categories),
    tuple(number for number, _ in categories),
    [image['file_name'] for image in images],
    np.array([image['id'] for image in images], np.int64),
    np.column_stack([np.array(sizes, np.int32), np.array(counts, np.int32)]),
    objects,
    ends,
    b''.join(masks),
    np.cumsum([len(text) for text in masks], dtype=np.int64),
  )


def learnable(boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
  """(n,) bool: which objects are learnt from: no crowds, and no box with a side below one pixel."""
  return ~crowd & (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)


def check_files(path: str, listed: Sequence[str], where: str, there: Iterable[str]) -> None:
  """UserError unless all images that annotations name are there.

  Args:
    path: of the annotations, for the message.
    listed: names of their images.
    where: these should be, for the message.
    there: names of the images that there are.
  """
  missing = sorted(set(listed) - set(there))
  if missing:
    raise UserError(
      f'{path} names {len(listed)} images, and {len(missing)} of them are not in {where}: '
      f'{_some(missing)}; add them, or choose the annotations that belong to these images'
    )


def _some(names: Sequence[str]) -> str:
  return ', '.join(names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')


def files_below(folder: str, names: Sequence[str]) -> set[str]:
  """Those of `names`, which are paths below a folder, that there are; every folder is read once."""
  found: set[str] = set()
  for part in {os.path.dirname(name) for name in names}:
    try:
      inside = os.listdir(os.path.join(folder, part))
    except OSError:
      continue
    found |= {os.path.join(part, name) for name in inside}
  return found & set(names)
