"""Images that are not RGB bytes: read as stored, moved as RGB is, never by way of 8 bits."""

import io
import re
import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from hivit_jax.data import pixels, transforms
from hivit_jax.data.decode import BrokenImage, decode_image
from hivit_jax.data.loader import train_loader
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from tests.data.noise import png

BANDS = np.random.default_rng(0).integers(0, 65536, (24, 40, 13)).astype(np.uint16)
FLOATS = np.random.default_rng(1).normal(250, 20, (24, 40, 1)).astype(np.float32)


def npy(array: np.ndarray, **named: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  if named:
    np.savez_compressed(buffer, image=array, **named)
  else:
    np.save(buffer, array)
  return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
  buffer = io.BytesIO()
  tifffile.imwrite(buffer, array, photometric='minisblack', **options)
  return buffer.getvalue()


def wide_png(array: np.ndarray) -> bytes:
  """PNG of 16 bits, which PIL does not write."""
  height, width, channels = array.shape
  header = struct.pack('>IIBBBBB', width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
  rows = b''.join(b'\0' + row.tobytes() for row in array.astype('>u2'))
  parts = ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    for kind, body in parts
  )


PLANES = np.moveaxis(BANDS, -1, 0)


@pytest.mark.parametrize(
  ('data', 'expected'),
  [
    (BANDS, BANDS),
    (BANDS[..., 0], BANDS[..., :1]),
    (BANDS.astype('>u2'), BANDS),
    (npy(BANDS), BANDS),
    (npy(BANDS.astype('>u2')), BANDS),
    (npy(FLOATS[..., 0].astype(np.float64)), FLOATS),
    (npy(BANDS, mask=BANDS[..., 0]), BANDS),
    (tiff(BANDS, planarconfig='contig'), BANDS),
    (tiff(PLANES, planarconfig='separate'), BANDS),
    (tiff(PLANES, compression='zlib', byteorder='>'), BANDS),  # pages
    (tiff(PLANES, bigtiff=True, tile=(16, 16)), BANDS),
    (tiff(FLOATS[..., 0]), FLOATS),
    (tiff(FLOATS[..., 0].astype(np.float16)), FLOATS.astype(np.float16).astype(np.float32)),
    (wide_png(BANDS[..., :1]), BANDS[..., :1]),
    (wide_png(BANDS[..., :3]), BANDS[..., :3]),
    (wide_png(BANDS[..., :4]), BANDS[..., :4]),
    (png((BANDS[..., :4] >> 8).astype(np.uint8)), (BANDS[..., :4] >> 8).astype(np.uint8)),
    (png((BANDS[..., :2] >> 8).astype(np.uint8)), (BANDS[..., :2] >> 8).astype(np.uint8)),
  ],
)
def test_every_file_gives_the_numbers_that_were_stored(data, expected):
  array = pixels.as_stored(data)
  assert array.dtype == expected.dtype
  assert array.dtype.isnative
  np.testing.assert_array_equal(array, expected)
  assert pixels.decode(data, expected.shape[2], expected.dtype.name).size == (40, 24)


@pytest.mark.parametrize(
  ('data', 'error', 'message'),
  [
    (npy(FLOATS * np.nan), BrokenImage, 'NaN or infinite'),
    (npy(BANDS)[:-5], BrokenImage, 'reshape|mmap|read'),
    (npy(BANDS, mask=BANDS)[:500], BrokenImage, 'zip'),
    (tiff(PLANES)[:4000], BrokenImage, '.'),
    (b'<html>', BrokenImage, 'not an image'),
    (BANDS.astype(np.int16), UserError, r'type int16 and shape \(24, 40, 13\): expected .*uint16'),
    (BANDS[None], UserError, r'shape \(1, 24, 40, 13\)'),
    (png(BANDS[..., 0]), UserError, r'uint16 of shape \(24, 40, 1\), but config.channels=13'),
    (npy(PLANES), UserError, r'channels come last: store \(height, width, channels\)'),
    (npy(BANDS.astype(np.float32)), UserError, 'but .*config.data.dtype=uint16; all images of'),
    (tiff(PLANES[:12].reshape(3, 4, 24, 40)), UserError, 'axes are .*YX: expected'),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(data, error, message):
  with pytest.raises(error, match=message) as raised:
    pixels.decode(data, 13, 'uint16')
  assert '\n' not in str(raised.value)


def test_an_unnamed_array_a_palette_and_absent_packages_are_user_errors(monkeypatch):
  buffer = io.BytesIO()
  np.savez(buffer, a=BANDS, b=BANDS)
  with pytest.raises(UserError, match='with the arrays a, b: name that of the image "image"'):
    pixels.as_stored(buffer.getvalue())
  buffer = io.BytesIO()
  Image.new('P', (4, 4)).save(buffer, 'PNG')
  with pytest.raises(UserError, match='PNG of mode P;1 cannot be taken as it is stored'):
    pixels.as_stored(buffer.getvalue())
  monkeypatch.setitem(sys.modules, 'tifffile', None)
  with pytest.raises(UserError, match='pip install tifffile'):
    pixels.as_stored(tiff(FLOATS))


def test_arrays_in_files_are_pictures_too():
  picture = np.random.default_rng(2).integers(0, 256, (8, 9, 3), np.uint8)
  np.testing.assert_array_equal(decode_image(npy(picture)), picture)
  with pytest.raises(UserError, match=r'--config.data.dtype=uint16'):
    decode_image(npy(BANDS))


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('size', [(17, 11), (90, 60)])
def test_resizing_is_that_of_pil(size, interpolation):
  """Of bytes exactly; 16 bits that hold bytes as well, but for PIL's rounding in between."""
  filtered = transforms.INTERPOLATIONS[interpolation]
  # Far from black and white, where PIL would cut between rows and columns.
  picture = np.random.default_rng(3).integers(80, 176, (6, 10, 3), np.uint8)
  picture = np.kron(picture, np.ones((4, 4, 1), np.uint8))
  expected = np.asarray(Image.fromarray(picture).resize(size, filtered)).astype(int)
  same = pixels.Pixels(np.concatenate([picture, picture], axis=2)).resize(size, filtered).array
  np.testing.assert_array_equal(same, np.concatenate([expected, expected], axis=2))
  wide = pixels.Pixels(picture.astype(np.uint16) * 257).resize(size, filtered).array
  assert wide.dtype == np.uint16
  assert np.abs(wide / 257 - expected).max() < 1.2  # twice half a step
  # More than 8 bits arrive: values between those of bytes.
  assert len(np.unique(wide)) > 300
  as_floats = pixels.Pixels(picture.astype(np.float32)).resize(size, filtered).array
  assert np.abs(as_floats - wide / 257).max() < 0.01


def test_what_interpolation_overshoots_is_cut_from_integers_alone():
  edge = np.zeros((4, 8, 2), np.uint16)
  edge[:, 4:] = 65535
  resized = pixels.Pixels(edge).resize((32, 4), Image.Resampling.BICUBIC).array[..., 1].astype(int)
  assert (np.diff(resized, axis=1) >= 0).all()  # nothing has wrapped around
  assert {0, 65535} <= set(resized[0])
  floats = pixels.Pixels(edge.astype(np.float32)).resize((32, 4), Image.Resampling.BICUBIC).array
  assert floats.min() < -1000
  assert floats.max() > 66535


def test_transforms_cut_and_mirror_as_they_do_pictures():
  picture = np.random.default_rng(4).integers(0, 256, (30, 50, 3), np.uint8)
  four = np.concatenate([picture, picture[..., :1]], axis=2)
  for seed in range(4):
    row, other = (
      transforms.train_transform((16, 32), scale=(0.3, 0.9), **own)(
        {'image': image}, np.random.default_rng(seed)
      )['image']
      for image, own in ((picture, {}), (four, {'channels': 4}))
    )
    np.testing.assert_array_equal(other[..., :3], row)
  row, other = (
    transforms.eval_transform((16, 32), **own)({'image': image})['image']
    for image, own in ((picture, {}), (four, {'channels': 4}))
  )
  np.testing.assert_array_equal(other[..., :3], row)


def test_changes_of_colour_and_unknown_types_are_refused():
  for options in ({'rand_augment': 'rand-m9-mstd0.5-inc1'}, {'color_jitter': 0.4}):
    with pytest.raises(UserError, match='they take bytes of 1 or 3 channels, not uint16 of 3'):
      transforms.train_transform(16, dtype='uint16', **options)
  with pytest.raises(UserError, match="dtype='int16': expected one of uint8, uint16, float32"):
    transforms.eval_transform(16, dtype='int16')


@pytest.fixture
def fields(tmp_path):
  """A folder with 13 bands of 16 bits, half in TIFF and half in .npy."""
  folder = tmp_path / 'train'
  folder.mkdir()
  for i in range(6):
    bands = BANDS + np.uint16(i)
    data = npy(bands) if i % 2 else tiff(np.moveaxis(bands, -1, 0))
    (folder / f'{i}.{"npy" if i % 2 else "TIF"}').write_bytes(data)
  return tmp_path


def test_a_folder_is_loaded_with_its_own_type(fields):
  source = open_source(f'folder:{fields}', 'train')
  assert len(source) == 6
  transform = transforms.train_transform(
    (24, 40), channels=13, dtype='uint16', scale=(1, 1), ratio=(1, 1), flip=False
  )
  with train_loader(source, transform, batch_size=6, seed=0, num_steps=1) as loader:
    batch = next(loader)['image']
  assert (batch.shape, batch.dtype) == ((6, 24, 40, 13), np.uint16)
  found = {int((image - BANDS)[0, 0, 0]): image for image in batch}
  assert sorted(found) == list(range(6))
  for i, image in found.items():
    np.testing.assert_array_equal(image, BANDS + np.uint16(i))


def test_a_file_of_another_type_is_named(fields):
  (fields / 'train' / 'odd.png').write_bytes(png(np.zeros((24, 40, 3), np.uint8)))
  source = open_source(f'folder:{fields}', 'train')
  transform = transforms.train_transform(16, channels=13, dtype='uint16')
  named = re.escape(str(fields / 'train' / 'odd.png'))
  with (
    train_loader(source, transform, batch_size=7, seed=0, num_steps=1) as loader,
    pytest.raises(UserError, match=rf'{named}: uint8 of shape \(24, 40, 3\), but config.channels'),
  ):
    next(loader)
