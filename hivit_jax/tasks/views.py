"""How an image of any size is shown to a segmenter that takes crops of one size.

A view is the image at one size, perhaps mirrored; windows of the model's size cover it. All that
happens to the logits before the softmax is linear and separate over rows and columns: windows are
enlarged to pixels, put in their places, averaged where they overlap, cut to the view, and resized
to the original. So it is a product with one matrix for the rows and one for the columns.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from hivit_jax.errors import UserError
from hivit_jax.models import resize

if TYPE_CHECKING:  # a benchmark of a step needs no data
  from hivit_jax.data.segmentation_transforms import ClassMap

_STRIDE = 4  # pixels from one place of the logits to the next
_MODES = ('whole', 'slide')

Size = tuple[int, int]


class View(NamedTuple):
  """One size of an image.

  Attributes:
    size: (height, width) of the resized image.
    mirrored: left and right are swapped.
    weight: share in the mean of the probabilities.
    tops, lefts: first rows and columns of the windows.
  """

  size: Size
  mirrored: bool
  weight: float
  tops: tuple[int, ...]
  lefts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Views:
  """Which views an image gets, and the transform that makes them.

  Attributes:
    crop: (height, width) of the model's images.
    inference: 'whole': the image is made as large as it fits into one crop; 'slide': its shorter
      side is made as long as the crop's, and windows slide over it.
    stride: (rows, columns) from one window to the next.
    scales: of the views with 'slide', relative to the crop; none is smaller than 1, so smaller ones
      count as 1 once more, as in the published evaluation.
    flip: each view mirrored as well.
    classes: what the numbers in label maps mean; None: the examples have none.
    channels, dtype: of the images, see `fields.decode`.
  """

  crop: Size
  inference: str = 'whole'
  stride: Size = (426, 426)
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False
  classes: 'ClassMap | None' = None
  channels: int = 3
  dtype: str = 'uint8'
  ragged = True  # see `loader.eval_loader`

  def __post_init__(self):
    if self.inference not in _MODES:
      raise UserError(f'inference={self.inference}: expected one of {", ".join(_MODES)}')
    if self.inference == 'whole' and tuple(self.scales) != (1.0,):
      raise UserError(
        f'scales={self.scales}: a whole image has one scale; several take inference=slide'
      )
    if not self.scales or min(self.scales) <= 0:
      raise UserError(f'scales={self.scales}: expected numbers above 0, such as (1.0, 1.25)')
    fits = all(0 < step <= side for step, side in zip(self.stride, self.crop, strict=True))
    if self.inference == 'slide' and not fits:
      raise UserError(
        f'stride={self.stride}: expected (rows, columns) from 1 to the crop, {self.crop}'
      )

  def __str__(self) -> str:
    """What a score has to say, such as: slide 640x640, stride 426x426, scale 1, mirrored."""
    parts = ['{} {}x{}'.format(self.inference, *self.crop)]
    if self.inference == 'slide':
      parts.append('stride {}x{}'.format(*self.stride))
      parts.append(
        f'scale{"s" * (len(self.scales) > 1)} {" ".join(f"{scale:g}" for scale in self.scales)}'
      )
    return ', '.join([*parts, *(['mirrored'] * self.flip)])

  def of(self, size: Size) -> list[View]:
    """The views of an image of (height, width) pixels; equal ones are one, with their weights."""
    weights: dict[Size, float] = {}
    for scale in self.scales:
      own = self._size(size, scale)
      weights[own] = weights.get(own, 0.0) + 1 / len(self.scales)
    mirrored = (False, True) if self.flip else (False,)
    return [
      View(
        own,
        flipped,
        weight / len(mirrored),
        *(starts(*sides) for sides in zip(own, self.crop, self.stride, strict=True)),
      )
      for own, weight in weights.items()
      for flipped in mirrored
    ]

  def _size(self, size: Size, scale: float) -> Size:
    if self.inference == 'whole':
      factor = min(crop / side for crop, side in zip(self.crop, size, strict=True))
      return tuple(  # pyright: ignore[reportReturnType]
        min(int(side * factor + 0.5), crop) for side, crop in zip(size, self.crop, strict=True)
      )
    short = min(self.crop)
    factor = max(short, int(short * scale)) / min(size)
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)

  def __call__(self, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Decodes an example and cuts its windows.

    Returns:
      `windows` (n, height, width, channels) as stored, the views' one after the other, row by row;
      `extent` (n, 2) int32, how many rows and columns of each are of the image; `label_map` (H, W),
      if there is one, and `image` (H, W, channels).
    """
    from hivit_jax.data import fields
    from hivit_jax.data.segmentation_transforms import KEYS

    keys = ('image',) if self.classes is None else KEYS
    decoded = fields.decode(example, keys, self.channels, self.dtype)
    if self.classes is not None:
      decoded = self.classes(decoded)
    image = decoded['image']
    windows, extent = [], []
    for view in self.of((image.height, image.width)):
      shown = image.resize(view.size[::-1], Image.Resampling.BILINEAR)
      pixels = fields.to_arrays({'image': shown})['image']
      pixels = pixels[:, ::-1] if view.mirrored else pixels
      for top in view.tops:
        for left in view.lefts:
          part = pixels[top : top + self.crop[0], left : left + self.crop[1]]
          window = np.zeros((*self.crop, self.channels), pixels.dtype)
          window[: part.shape[0], : part.shape[1]] = part
          windows.append(window)
          extent.append(part.shape[:2])
    arrays = {
      'windows': np.stack(windows),
      'extent': np.array(extent, np.int32),
      'image': fields.to_arrays({'image': image})['image'],
    }
    if 'segmentation' in decoded:
      arrays['label_map'] = np.asarray(decoded['segmentation'])
    return arrays


def starts(side: int, crop: int, stride: int) -> tuple[int, ...]:
  """First pixels of the windows along one side; the last one ends with it."""
  count = max(side - crop + stride - 1, 0) // stride + 1
  return tuple(min(i * stride, max(side - crop, 0)) for i in range(count))


def matrix(first: tuple[int, ...], crop: int, side: int, out: int) -> np.ndarray:
  """What the logits of all windows along one side become there, see above.

  Args:
    first: see `starts`.
    crop: pixels of a window.
    side: pixels of the view.
    out: pixels of the result.

  Returns:
    (out, len(first) * crop / 4) float32.
  """
  enlarged = resize.bilinear_matrix(crop // _STRIDE, crop)
  count = np.zeros((side, 1))
  placed = np.zeros((side, len(first), crop // _STRIDE))
  for i, start in enumerate(first):
    rows = min(crop, side - start)
    placed[start : start + rows, i] = enlarged[:rows]
    count[start : start + rows] += 1
  mean = placed.reshape(side, -1) / count
  return (mean if side == out else resize.bilinear_matrix(side, out) @ mean).astype(np.float32)


def matrices(view: View, crop: Size, size: Size) -> tuple[np.ndarray, np.ndarray]:
  """`matrix` of the rows and of the columns of a view, for a result of `size`; not mirrored."""
  rows = matrix(view.tops, crop[0], view.size[0], size[0])
  columns = matrix(view.lefts, crop[1], view.size[1], size[1])
  return rows, columns[::-1] if view.mirrored else columns
