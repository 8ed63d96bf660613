"""The fields of an example: how each is decoded, moved and turned into an array.

A change of geometry - `crop`, `resize`, `mirror` - is made to every field in the field's own way:

| field | from a source | decoded | geometry |
|---|---|---|---|
| `image` | encoded file, or array | PIL image, `Pixels` or `Reducible` | pixels, interpolated |
| `segmentation` | PNG, or 2-D array of integers | PIL image, 'L' or 'I;16' | labels, nearest |
| `instances` | the same | the same | the same |
| `objects` | dict: `boxes`, and arrays with a row a box | `boxes` as float32 (n, 4) | coordinates |
| numbers, strings | as they are | as they are | none |

Boxes are (left, top, right, bottom) in pixels. Any other field needs a rule in every step that
changes the geometry, see `per_field`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hivit_jax import settings
from hivit_jax.data import pixels
from hivit_jax.data.decode import BrokenImage, decode_image, decode_label_map
from hivit_jax.data.reduced import JPEG_FILES, reducible
from hivit_jax.errors import UserError

Example = dict[str, Any]
Box = tuple[int, int, int, int]

CLASSIFIED = ('image', 'label')
_LABEL_MAPS = ('segmentation', 'instances')
_SCALARS = (str, int, float, np.generic)  # bool is an int


def decode(
  example: Mapping[str, Any],
  keys: Sequence[str],
  channels: int,
  dtype: str = 'uint8',
  reduce_jpegs: bool = False,
) -> Example:
  """Returns the named fields of an example, decoded.

  Args:
    example: From a source. Without `label` that is -1: unknown.
    keys: Those to take; the others cost nothing.
    channels: Of the image.
    dtype: Of its pixels. Bytes of 3 (RGB) or 1 (greyscale) channels are a PIL image, all others
      `pixels.Pixels`.
    reduce_jpegs: A JPEG without label map or objects is `reduced.Reducible`, for a step that
      resizes it.

  Raises:
    BrokenImage: The image or label map is damaged, or they differ in size.
    UserError: The example lacks a field.
  """
  decoded = {}
  for name in keys:
    if name not in example:
      if name != 'label':
        known = ', '.join(example)
        raise UserError(f'there is no {name!r} to learn from; the data set has: {known}')
      decoded[name] = -1
    elif name == 'image' and not settings.is_picture(channels, dtype):
      decoded[name] = pixels.decode(example[name], channels, dtype)
    elif name == 'image':
      # What lies on an image lies on the pixels as they are stored.
      alone, data = not {*_LABEL_MAPS, 'objects'} & set(keys), example[name]
      if reduce_jpegs and alone and isinstance(data, bytes) and data.startswith(JPEG_FILES):
        decoded[name] = reducible(data, channels)
      else:
        decoded[name] = decode_image(data, channels=channels, upright=alone)
    elif name in _LABEL_MAPS:
      decoded[name] = decode_label_map(example[name])
    elif name == 'objects':
      boxes = np.asarray(example[name]['boxes'], np.float32).reshape(-1, 4)
      decoded[name] = {**example[name], 'boxes': boxes}
    else:
      decoded[name] = example[name]
  for name in _LABEL_MAPS:
    sizes = [decoded[key].size for key in ('image', name) if 'image' in decoded and name in decoded]
    if sizes and sizes[0] != sizes[1]:
      image, labels = ('{}x{}'.format(*size) for size in sizes)
      raise BrokenImage(f'the image has {image} pixels, its label map {labels}')
  return decoded


def per_field(example: Example, step: object, rules: Mapping[str, Callable[[Any], Any]]) -> Example:
  """Returns an example in which every field with a place in the image was changed by its rule.

  Args:
    example: Decoded.
    step: What changes it, for the error.
    rules: Field -> function of its value. Numbers and strings stay as they are.

  Raises:
    UserError: A field has no rule.
  """
  changed = {}
  for name, value in example.items():
    if name in rules:
      changed[name] = rules[name](value)
    elif isinstance(value, _SCALARS):
      changed[name] = value
    else:
      raise _no_rule(step, name)
  return changed


def crop(example: Example, box: Box, step: object) -> Example:
  """Cuts a rectangle out; boxes are cut to it, and objects that are outside are left out.

  Args:
    example: Decoded.
    box: (left, top, right, bottom) in pixels, inside the image.
    step: On whose behalf, for errors.
  """
  left, top, right, bottom = box

  def cut(boxes: np.ndarray) -> np.ndarray:
    moved = boxes - np.array([left, top, left, top], np.float32)
    return moved.clip(0, np.array([right - left, bottom - top] * 2, np.float32))

  return per_field(
    example,
    step,
    {
      'image': lambda image: image.crop(box),
      **dict.fromkeys(_LABEL_MAPS, lambda labels: labels.crop(box)),
      'objects': lambda objects: _change_boxes(objects, cut, step),
    },
  )


def resize(
  example: Example, size: tuple[int, int], interpolation: Image.Resampling, step: object
) -> Example:
  """Resizes the image with antialiasing, and all else with it.

  Args:
    example: Decoded, with an image.
    size: (width, height) in pixels.
    interpolation: Of the image; a label map gets the label at the nearest place.
    step: On whose behalf, for errors.
  """
  scale = np.tile(np.array(size) / example['image'].size, 2)

  def stretch(boxes: np.ndarray) -> np.ndarray:
    return (boxes * scale).clip(0, np.tile(size, 2)).astype(np.float32)

  return per_field(
    example,
    step,
    {
      'image': lambda image: image.resize(size, interpolation),
      **dict.fromkeys(_LABEL_MAPS, lambda labels: labels.resize(size, Image.Resampling.NEAREST)),
      'objects': lambda objects: _change_boxes(objects, stretch, step),
    },
  )


def mirror(example: Example, step: object) -> Example:
  """Swaps left and right of a decoded example, which has an image."""
  width = np.float32(example['image'].width)

  def swap(boxes: np.ndarray) -> np.ndarray:
    left, top, right, bottom = boxes.T
    return np.stack([width - right, top, width - left, bottom], 1)

  def flip(image: Any) -> Any:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

  return per_field(
    example,
    step,
    {
      'image': flip,
      **dict.fromkeys(_LABEL_MAPS, flip),
      'objects': lambda objects: _change_boxes(objects, swap, step),
    },
  )


def to_arrays(example: Example) -> dict[str, np.ndarray]:
  """Returns the arrays that a batch is made of.

  The image as (H, W, C), a label map as uint8 or uint16 (H, W), integers as int32 (), other
  numbers as float32 (). Arrays stay as they are. Strings are left out: devices have none.

  Raises:
    UserError: A field is something else, such as objects in any number.
  """
  arrays: dict[str, np.ndarray] = {}
  for name, value in example.items():
    if isinstance(value, str):
      continue
    if isinstance(value, pixels.Pixels):
      arrays[name] = value.array
    elif isinstance(value, Image.Image):
      array = np.asarray(value)
      arrays[name] = array[..., None] if name == 'image' and array.ndim == 2 else array
    elif isinstance(value, np.ndarray):
      arrays[name] = value
    elif isinstance(value, bool | np.bool_):
      arrays[name] = np.asarray(value)
    elif isinstance(value, int | np.integer):
      arrays[name] = np.asarray(value, np.int32)
    elif isinstance(value, float | np.floating):
      arrays[name] = np.asarray(value, np.float32)
    else:
      raise UserError(
        f'the field {name!r} is a {type(value).__name__}; the last step of a transform has to turn '
        'it into arrays of fixed shape, padded where numbers vary'
      )
  return arrays


def _change_boxes(
  objects: Mapping[str, Any], change: Callable[[np.ndarray], np.ndarray], step: object
) -> dict[str, Any]:
  """Changes the boxes, and leaves out the rows of those that have become empty."""
  boxes = change(objects['boxes'])
  keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
  changed: dict[str, Any] = {}
  for name, value in objects.items():
    if name == 'boxes':
      changed[name] = boxes[keep]
      continue
    values = np.asarray(value)
    if values.shape != (len(boxes),) or values.dtype.kind not in 'biuf':  # masks, for example
      raise _no_rule(step, f'objects.{name}')
    changed[name] = values[keep]
  return changed


def _no_rule(step: object, field: str) -> UserError:
  return UserError(
    f'{type(step).__name__} does not know what to do with the field {field!r}; leave out the step '
    'or the field, or write a step that does'
  )
