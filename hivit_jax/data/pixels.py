"""Images that are not RGB bytes: any number of channels, of 8, 16 or 32 bits, as they are stored.

| file | what is read |
|---|---|
| TIFF | the first image: bands or planes (tifffile's axes), or pages of one size, are channels |
| PNG and others that PIL reads | grey or RGB, with or without alpha, of 8 bits; PNG also of 16 |
| `.npy` | (H, W) or (H, W, C) |
| `.npz` | the same: its array `image`, or its only one |

Nothing is converted but the order of bytes, and other floats to float32.
"""

import dataclasses
import importlib
import io
from typing import Any

import numpy as np
from PIL import Image

from hivit_jax import settings
from hivit_jax.data.decode import FORMATS, NUMPY_FILES, BrokenImage, read_numpy, reason
from hivit_jax.errors import UserError

TIFF_FILES = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # how they begin; the last two: BigTIFF
_AS_STORED = ('L', 'LA', 'RGB', 'RGBA', 'I;16', 'I;16B', 'I;16L', 'F')  # modes of PIL
# PIL keeps the high bytes of PNG's 16-bit colours. Read as if their bytes were swapped, it keeps
# the low ones.
_WIDE = {'RGB;16B': 'RGB;16L', 'RGBA;16B': 'RGBA;16L'}


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
  """A decoded image with the methods of a PIL image that move pixels.

  Attributes:
    array: (H, W, C) uint8, uint16 or float32.
  """

  array: np.ndarray

  @property
  def height(self) -> int:
    return self.array.shape[0]

  @property
  def width(self) -> int:
    return self.array.shape[1]

  @property
  def size(self) -> tuple[int, int]:
    """(width, height), as PIL has it."""
    return self.width, self.height

  def crop(self, box: tuple[int, int, int, int]) -> 'Pixels':
    """The rectangle (left, top, right, bottom), which is inside the image."""
    left, top, right, bottom = box
    return Pixels(self.array[top:bottom, left:right])

  def transpose(self, method: Image.Transpose) -> 'Pixels':
    """Left and right swapped: the only `method` there is."""
    assert method == Image.Transpose.FLIP_LEFT_RIGHT, method
    return Pixels(self.array[:, ::-1])

  def resize(
    self,
    size: tuple[int, int],
    interpolation: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
  ) -> 'Pixels':
    """PIL's antialiased resizing of a part to (width, height), channel by channel.

    Bytes as PIL has them. 16 bits are computed in float32, rounded, and cut to their range; floats
    are not: bicubic interpolation overshoots at edges.
    """
    dtype = self.array.dtype
    planes = np.moveaxis(self.array, -1, 0)
    planes = np.ascontiguousarray(planes, np.uint8 if dtype == np.uint8 else np.float32)
    images = [Image.fromarray(plane).resize(size, interpolation, box) for plane in planes]
    resized = np.stack([np.asarray(image) for image in images], axis=-1)
    if dtype == np.uint16:
      resized = np.clip(np.rint(resized), 0, np.iinfo(dtype).max)
    return Pixels(resized.astype(dtype, copy=False))


def decode(data: bytes | np.ndarray, channels: int, dtype: str) -> Pixels:
  """Decodes an image of known channels and type.

  Args:
    data: An encoded file, or an array.
    channels: That it has to have.
    dtype: One of `settings.DTYPES`, of its pixels.

  Raises:
    BrokenImage: See `as_stored`.
    UserError: It has other channels or another type.
  """
  array = as_stored(data)
  if array.shape[2] != channels or array.dtype != dtype:
    swapped = array.shape[0] == channels != array.shape[2]
    way = (
      'channels come last: store (height, width, channels)'
      if swapped and array.dtype == dtype
      else 'all images of a data set must have the same'
    )
    raise UserError(
      f'{array.dtype} of shape {array.shape}, but config.channels={channels} and '
      f'config.data.dtype={dtype}; {way}'
    )
  return Pixels(array)


def as_stored(data: bytes | np.ndarray) -> np.ndarray:
  """Returns the pixels of an image, (H, W, C) uint8, uint16 or float32.

  Args:
    data: An encoded file, or an array (H, W) or (H, W, C).

  Raises:
    BrokenImage: It is none, is truncated or damaged, or holds NaN or infinite numbers.
    UserError: It has another type or shape, or a package that it needs is absent.
  """
  if isinstance(data, np.ndarray):
    array = data
  else:
    try:
      array = _read(data)
    except (BrokenImage, UserError):
      raise
    except Exception as error:  # Parsers fail in every possible way on damaged input.
      raise BrokenImage(reason(error, data)) from error
  if array.ndim == 2:
    array = array[..., None]
  dtype = np.dtype(np.float32) if array.dtype.kind == 'f' else array.dtype.newbyteorder('=')
  if array.ndim != 3 or not array.size or dtype.name not in settings.DTYPES:
    raise UserError(
      f'image of type {array.dtype} and shape {array.shape}: expected (height, width, channels) of '
      f'{", ".join(settings.DTYPES)}'
    )
  array = array.astype(dtype, copy=False)
  if dtype.kind == 'f' and not np.isfinite(array).all():
    raise BrokenImage('it holds NaN or infinite numbers')
  return array


def _read(data: bytes) -> np.ndarray:
  if data.startswith(NUMPY_FILES):
    return read_numpy(data)
  return _tiff(data) if data.startswith(TIFF_FILES) else _picture(data)


def _tiff(data: bytes) -> np.ndarray:
  try:
    tifffile: Any = importlib.import_module('tifffile')
  except ImportError:
    raise UserError('TIFF files with their own types take: pip install tifffile') from None
  try:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
      series = file.series[0]
      array, axes = series.asarray(), series.axes
  except ValueError as error:
    if 'imagecodecs' not in str(error):
      raise
    raise UserError(f'{error}: pip install imagecodecs') from None
  others = [i for i, axis in enumerate(axes) if axis not in 'YX']
  if not {'Y', 'X'} <= set(axes) or sum(array.shape[i] > 1 for i in others) > 1:
    raise UserError(
      f'TIFF of shape {array.shape}, whose axes are {axes}: expected rows (Y), columns (X), and '
      'one further axis, of bands or pages'
    )
  rows, columns = axes.index('Y'), axes.index('X')
  shape = array.shape[rows], array.shape[columns], -1
  return array.transpose(rows, columns, *others).reshape(shape)


def _picture(data: bytes) -> np.ndarray:
  image = Image.open(io.BytesIO(data), formats=FORMATS)
  stored = image.tile[0].args if image.format == 'PNG' else None
  if image.mode not in _AS_STORED or stored == 'LA;16B':
    raise UserError(
      f'{image.format} of mode {stored or image.mode} cannot be taken as it is stored; save it as '
      'TIFF or .npy'
    )
  pixels = np.asarray(image)
  if stored not in _WIDE:
    return pixels
  low = Image.open(io.BytesIO(data), formats=('PNG',))
  low.tile = [low.tile[0]._replace(args=_WIDE[stored])]
  return pixels.astype(np.uint16) << 8 | np.asarray(low)
