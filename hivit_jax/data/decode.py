"""From an encoded file to an upright 8-bit PIL image, or to a label map, or `BrokenImage`."""

import io
import os
import pathlib
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageChops

from hivit_jax.errors import UserError

# What is tried on the bytes, most likely first. A closed list on purpose: some of PIL's other
# plugins start external programs (EPS runs Ghostscript), which data must not be able to do.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'JPEG2000', 'AVIF')
MODES = {1: 'L', 3: 'RGB'}
NUMPY_FILES = (b'\x93NUMPY', b'PK\x03\x04')  # how .npy and .npz begin

_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

# ImageNet has a handful of files with damaged EXIF and sound pixels. PIL, which reads EXIF with its
# TIFF parser, would warn about each of them.
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.TiffImagePlugin')


class BrokenImage(Exception):
  """An example without a usable image; the message is the reason, without the example's name."""


def decode_image(
  data: bytes | np.ndarray,
  *,
  channels: int = 3,
  upright: bool = True,
  max_pixels: int | None = None,
) -> Image.Image:
  """Decodes one image at full resolution.

  The pixels of an ordinary JPEG are exactly what `Image.open(...).convert('RGB')` gives: no scaling
  inside the JPEG decoder, which would be faster but is not what the published results used. Beyond
  that: EXIF rotation is applied, transparency is laid over white, 16 bits are scaled to 8 by the
  format's full range, CMYK is converted with or without Adobe's inversion, whichever the file uses,
  and an animation gives its first frame.

  Args:
    data: An encoded file (`FORMATS`, .npy, .npz), or pixels as uint8 (H, W) or (H, W, C) with C =
      1, 3 or 4.
    channels: 3 for an RGB image, 1 for greyscale.
    upright: Apply the rotation that EXIF tells.
    max_pixels: What an encoded picture may have; of larger ones only the header is read.

  Returns:
    An image of mode 'RGB' or 'L'.

  Raises:
    BrokenImage: The data is no image, is truncated or damaged, has more pixels than PIL's limit
      against decompression bombs, or holds numbers of unknown range (float, 32-bit integers).
    UserError: `channels` is neither 1 nor 3, or `data` is an array of another type or shape.
  """
  if channels not in MODES:
    raise UserError(f'Images can be decoded to 1 or 3 channels, not to {channels!r}.')
  if not isinstance(data, np.ndarray) and data.startswith(NUMPY_FILES):
    data = read_numpy(data)
  if isinstance(data, np.ndarray):
    return _to_mode(_from_array(data), MODES[channels])
  try:
    image = _from_file(data, max_pixels)
    return _to_mode(_upright(image) if upright else image, MODES[channels])
  except BrokenImage:
    raise
  except Exception as error:  # PIL's parsers fail in every possible way on damaged input.
    raise BrokenImage(reason(error, data)) from error


def decode_label_map(data: bytes | np.ndarray) -> Image.Image:
  """Decodes one map of integer labels at full resolution.

  Args:
    data: A PNG file of 1 to 16 bits, greyscale or with a palette, whose indices are then the
      labels; or an array of integers in [0, 65535] (H, W).

  Returns:
    An image of mode 'L' (from at most 8 bits, or uint8) or 'I;16'.

  Raises:
    BrokenImage: The data is no such file, or is truncated or damaged.
    UserError: `data` is an array of another type, shape or range.
  """
  if isinstance(data, np.ndarray):
    fits = data.ndim == 2 and data.dtype.kind in 'iu'
    if not fits or (data.size and not 0 <= data.min() <= data.max() <= 65535):
      raise UserError(
        f'Label map of type {data.dtype} and shape {data.shape}: expected integers from 0 to 65535 '
        'of shape (height, width).'
      )
    return Image.fromarray(data if data.dtype == np.uint8 else data.astype(np.uint16))
  try:
    image = Image.open(io.BytesIO(data), formats=('PNG',))
    stored = image.tile[0].args
    labels = np.asarray(image)
  except Exception as error:  # As above.
    raise BrokenImage(f'label map: {reason(error, data)}') from error
  if labels.ndim != 2:
    raise BrokenImage(f'label map: has mode {image.mode}; expected one integer a pixel')
  # PIL stretches greys of 2 and 4 bits to 0..255, as is right for pictures.
  if stored in ('L;2', 'L;4'):
    labels = labels // (85 if stored == 'L;2' else 17)
  dtype = np.uint16 if image.mode.startswith('I') else np.uint8
  return Image.fromarray(labels.astype(dtype, copy=False))


def read_file(path: str | os.PathLike[str]) -> bytes:
  """Returns the bytes of a file; `BrokenImage` when it cannot be read."""
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise BrokenImage(error.strerror) from error


def read_numpy(data: bytes) -> np.ndarray:
  """Returns the array of a .npy file, or that of a .npz file named `image` or alone there."""
  try:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
      return loaded
    names = loaded.files
    if 'image' in names or len(names) == 1:
      return loaded['image' if 'image' in names else names[0]]
  except Exception as error:  # As above.
    raise BrokenImage(reason(error, data)) from error
  raise UserError(f'.npz file with the arrays {", ".join(names)}: name that of the image "image"')


def _from_array(array: np.ndarray) -> Image.Image:
  if array.ndim == 3 and array.shape[-1] == 1:
    array = array[..., 0]
  if array.dtype != np.uint8 or not (
    array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
  ):
    raise UserError(
      f'Image array of type {array.dtype} and shape {array.shape}: expected uint8 (height, width) '
      'or (height, width, channels) with 1, 3 or 4 channels. Others are taken as they are stored, '
      f'with --config.channels=C --config.data.dtype={array.dtype}.'
    )
  return Image.fromarray(array)


def _from_file(data: bytes, max_pixels: int | None) -> Image.Image:
  image = Image.open(io.BytesIO(data), formats=FORMATS)
  if max_pixels is not None and image.width * image.height > max_pixels:
    raise BrokenImage(f'{image.width}x{image.height} pixels; at most {max_pixels} are read')
  image.load()
  if image.mode == 'CMYK' and image.format == 'JPEG' and 'adobe' not in image.info:
    # PIL inverts every CMYK JPEG, but only those with Adobe's marker are stored inverted.
    image = ImageChops.invert(image)
  return image


def _upright(image: Image.Image) -> Image.Image:
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
  except Exception:  # Damaged EXIF raises anything, and says nothing about the pixels.
    return image
  return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
  if image.mode.startswith('I'):
    image = _scale_16_bit(image)
  elif image.mode == 'F':
    raise BrokenImage(
      'pixels are 32-bit floats of unknown range; save it with 8 or 16 bits, '
      'or take them as they are, --config.data.dtype=float32'
    )
  if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
    image = _over_white(image)
  return image if image.mode == mode else image.convert(mode)


def _scale_16_bit(image: Image.Image) -> Image.Image:
  """Modes I;16* and I: PIL's own conversion to 8 bits would clip at 255 instead of scaling."""
  pixels = np.asarray(image).astype(np.int64)
  if pixels.min() < 0 or pixels.max() > 65535:
    raise BrokenImage(
      f'pixels are integers from {pixels.min()} to {pixels.max()}; save it with 8 or 16 bits'
    )
  return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
  if image.mode in ('RGBa', 'La'):  # Premultiplied: PIL only converts these to their plain form.
    image = image.convert(image.mode.replace('a', 'A'))
  white = Image.new('RGBA', image.size, 'white')
  white.alpha_composite(image.convert('RGBA'))
  return white.convert('RGB')


def reason(error: Exception, data: bytes) -> str:
  """Returns why a file could not be decoded, in one line."""
  if isinstance(error, Image.UnidentifiedImageError):
    return f'not an image ({len(data)} bytes, starting with {bytes(data[:8])!r})'
  return ' '.join(str(error).split()) or type(error).__name__
