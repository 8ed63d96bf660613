"""decode_image: every kind of file becomes the upright 8-bit picture, or BrokenImage."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data.decode import BrokenImage, decode_image
from hivit_jax.errors import UserError

# Smooth, so that JPEG keeps it; asymmetric, so that a wrong rotation shows.
ROWS, COLUMNS = np.mgrid[0:24, 0:40]
PICTURE = np.stack([ROWS * 10, COLUMNS * 6, 200 - ROWS * 4 - COLUMNS], -1).astype(np.uint8)


def encode(image: Image.Image, file_format: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def png(header: bytes, pixels: bytes) -> bytes:
  """A PNG file made by hand: PIL writes neither 16-bit colour nor absurd sizes."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  parts = (chunk(b'IHDR', header), chunk(b'IDAT', zlib.compress(pixels)), chunk(b'IEND', b''))
  return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def decoded(data, channels: int = 3) -> np.ndarray:
  image = decode_image(data, channels=channels)
  assert image.mode == {1: 'L', 3: 'RGB'}[channels]
  return np.asarray(image).astype(int)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: int) -> None:
  assert actual.shape == expected.shape
  assert np.abs(actual - expected.astype(int)).max() <= tolerance


def test_rgb_jpeg_has_the_pixels_that_pil_decodes():
  data = encode(Image.fromarray(PICTURE), 'JPEG')
  expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
  np.testing.assert_array_equal(decoded(data), expected)


@pytest.mark.parametrize(
  ('file_format', 'options'),
  [('PNG', {}), ('BMP', {}), ('TIFF', {}), ('PPM', {}), ('WEBP', {'lossless': True})],
)
def test_lossless_formats_give_the_pixels_back(file_format, options):
  data = encode(Image.fromarray(PICTURE), file_format, **options)
  np.testing.assert_array_equal(decoded(data), PICTURE)


def test_greyscale_fills_three_channels_and_one_channel_is_luma():
  grey = PICTURE[..., 0]
  data = encode(Image.fromarray(grey), 'PNG')
  np.testing.assert_array_equal(decoded(data), np.repeat(grey[..., None], 3, -1))
  np.testing.assert_array_equal(decoded(data, channels=1), grey)
  luma = PICTURE @ np.array([0.299, 0.587, 0.114])
  assert_close(decoded(encode(Image.fromarray(PICTURE), 'PNG'), channels=1), luma, 1)


def test_one_bit_image_becomes_black_and_white():
  bits = (ROWS + COLUMNS) % 3 == 0
  data = encode(Image.fromarray(bits), 'PNG')
  assert Image.open(io.BytesIO(data)).mode == '1'
  np.testing.assert_array_equal(decoded(data, channels=1), bits * 255)


@pytest.mark.parametrize('alpha', ['bytes', 'index', 'none'])
def test_palette_is_looked_up_and_its_transparent_entries_are_white(alpha):
  image = Image.fromarray((COLUMNS % 3).astype(np.uint8)).convert('P')
  image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 250])
  options = {'bytes': {'transparency': bytes([255, 0, 255])}, 'index': {'transparency': 1}}
  data = encode(image, 'PNG', **options.get(alpha, {}))
  assert Image.open(io.BytesIO(data)).mode == 'P'
  middle = [200, 100, 0] if alpha == 'none' else [255, 255, 255]
  expected = np.array([[10, 20, 30], middle, [0, 0, 250]])[COLUMNS % 3]
  np.testing.assert_array_equal(decoded(data), expected)


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_alpha_is_laid_over_white(mode):
  colour = PICTURE if mode == 'RGBA' else np.repeat(PICTURE[..., :1], 3, -1)
  alpha = (COLUMNS * 6).astype(np.uint8)
  image = Image.fromarray(colour).convert(mode)
  image.putalpha(Image.fromarray(alpha))
  share = alpha[..., None] / 255
  assert_close(decoded(encode(image, 'PNG')), colour * share + 255 * (1 - share), 1)


def test_transparent_colour_of_an_rgb_png_is_white():
  picture = PICTURE.copy()
  picture[3, 5] = [1, 2, 3]
  data = encode(Image.fromarray(picture), 'PNG', transparency=(1, 2, 3))
  assert decoded(data)[3, 5].tolist() == [255, 255, 255]
  np.testing.assert_array_equal(decoded(data)[4:], PICTURE[4:])


def without_adobe_marker(data: bytes) -> bytes:
  start = data.index(b'\xff\xee')
  (length,) = struct.unpack('>H', data[start + 2 : start + 4])
  return data[:start] + data[start + 2 + length :]


def test_cmyk_jpeg_is_right_inverted_as_adobe_does_and_plain():
  cmyk = np.concatenate([255 - PICTURE, np.zeros_like(PICTURE[..., :1])], -1)
  image = Image.frombytes('CMYK', (40, 24), cmyk.tobytes())
  inverted = encode(image, 'JPEG', quality=98)
  assert b'Adobe' in inverted
  assert_close(decoded(inverted), PICTURE, 4)
  negative = Image.frombytes('CMYK', (40, 24), (255 - cmyk).tobytes())
  plain = without_adobe_marker(encode(negative, 'JPEG', quality=98))
  assert_close(decoded(plain), PICTURE, 4)


@pytest.mark.parametrize('file_format', ['PNG', 'TIFF'])
def test_16_bit_grey_is_scaled_and_not_clipped(file_format):
  grey = (ROWS * 2000 + COLUMNS * 400).astype(np.uint16)
  data = encode(Image.fromarray(grey), file_format)
  np.testing.assert_array_equal(decoded(data, channels=1), np.round(grey / 257))


def test_16_bit_big_endian_tiff_and_range_ends():
  grey = np.array([[0, 128, 129, 65535]], np.uint16)
  image = Image.frombytes('I;16B', (4, 1), grey.astype('>u2').tobytes())
  data = encode(image, 'TIFF')
  assert Image.open(io.BytesIO(data)).mode == 'I;16B'
  assert decoded(data, channels=1).tolist() == [[0, 0, 1, 255]]


def test_16_bit_colour_png_is_scaled():
  wide = PICTURE.astype('>u2') * 257
  rows = b''.join(b'\0' + row.tobytes() for row in wide.astype('>u2'))
  data = png(struct.pack('>IIBBBBB', 40, 24, 16, 2, 0, 0, 0), rows)
  np.testing.assert_array_equal(decoded(data), PICTURE)


def test_32_bit_integers_count_as_16_bit_where_they_fit():
  grey = (ROWS * 2000).astype(np.int32)
  np.testing.assert_array_equal(
    decoded(encode(Image.fromarray(grey), 'TIFF'), channels=1), np.round(grey / 257)
  )
  with pytest.raises(BrokenImage, match=r'from 0 to 70000.*8 or 16 bits'):
    decode_image(encode(Image.fromarray(grey // 46000 * 70000), 'TIFF'))


def test_float_pixels_are_refused_with_the_way_out():
  with pytest.raises(BrokenImage, match='floats of unknown range; save it with 8 or 16 bits'):
    decode_image(encode(Image.fromarray(ROWS.astype(np.float32)), 'TIFF'))


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation_is_applied(file_format, orientation):
  # The stored pixels for each orientation, from the definition in the EXIF standard: where row 0
  # and column 0 of the stored picture are in the scene.
  stored = {
    1: PICTURE,
    2: PICTURE[:, ::-1],
    3: PICTURE[::-1, ::-1],
    4: PICTURE[::-1],
    5: PICTURE.transpose(1, 0, 2),
    6: PICTURE.transpose(1, 0, 2)[::-1],
    7: PICTURE.transpose(1, 0, 2)[::-1, ::-1],
    8: PICTURE.transpose(1, 0, 2)[:, ::-1],
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, quality=98)
  assert_close(decoded(data), PICTURE, 8 if file_format == 'JPEG' else 0)


def test_damaged_exif_costs_neither_the_image_nor_a_warning(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  exif[0x010E] = 'a description that is long enough to be stored elsewhere'
  data = encode(Image.fromarray(PICTURE), 'JPEG', exif=exif)
  cut = data.index(b'Exif\0\0') + 26  # Inside the first directory, beyond its header.
  path = tmp_path / 'damaged.jpg'
  path.write_bytes(data[:cut] + b'\xff' * 12 + data[cut + 12 :])
  # In its own process: the filter that the module installs comes before the one for the tests.
  code = (
    'import sys, pathlib; from hivit_jax.data.decode import decode_image;'
    'print(sorted(decode_image(pathlib.Path(sys.argv[1]).read_bytes()).size))'
  )
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code, path], capture_output=True, text=True, check=False
  )
  assert (done.stdout, done.stderr) == ('[24, 40]\n', '')


def test_animation_gives_its_first_frame():
  frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (50, 200)]
  data = encode(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  assert np.unique(decoded(data)).tolist() == [50]


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP'])
@pytest.mark.parametrize('share', [0.02, 0.3, 0.9])
def test_truncated_file_is_broken(file_format, share):
  rng = np.random.default_rng(0)
  data = encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), file_format)
  with pytest.raises(BrokenImage):
    decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
  'data', [b'', b'<html>404</html>', b'\0' * 100, b'\xff\xd8\xff\xe0'], ids=repr
)
def test_what_is_no_image_is_broken(data):
  with pytest.raises(BrokenImage):
    decode_image(data)


def test_reason_says_what_the_bytes_begin_with():
  with pytest.raises(BrokenImage, match=r"not an image \(16 bytes, starting with b'<html>40'\)"):
    decode_image(b'<html>404</html>')


def test_postscript_is_not_even_tried():
  data = encode(Image.fromarray(PICTURE), 'EPS')
  assert Image.open(io.BytesIO(data)).format == 'EPS'
  with pytest.raises(BrokenImage, match='not an image'):
    decode_image(data)


def test_decompression_bomb_is_broken_without_being_decoded():
  side = 30_000  # 900 million pixels, one bit each, in a file of 110 kB
  data = png(struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0), b'\0' * (side * (side // 8 + 1)))
  assert len(data) < 200_000
  with pytest.raises(BrokenImage, match='decompression bomb'):
    decode_image(data)


def test_arrays_pass_through_as_pixels():
  np.testing.assert_array_equal(decoded(PICTURE), PICTURE)
  np.testing.assert_array_equal(decoded(PICTURE[::2, ::-1]), PICTURE[::2, ::-1])
  grey = PICTURE[..., :1]
  np.testing.assert_array_equal(decoded(grey), np.repeat(grey, 3, -1))
  np.testing.assert_array_equal(decoded(grey[..., 0], channels=1), grey[..., 0])


@pytest.mark.parametrize('array', [PICTURE.astype(np.float32), PICTURE[..., :2], PICTURE[None]])
def test_array_of_another_type_or_shape_is_a_user_error(array):
  with pytest.raises(UserError, match=r'expected uint8 \(height, width\)'):
    decode_image(array)


def test_only_one_or_three_channels():
  with pytest.raises(UserError, match='to 1 or 3 channels, not to 4'):
    decode_image(PICTURE, channels=4)
