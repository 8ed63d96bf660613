"""One draw moves every field of an example, each in its own way."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data import fields, transforms
from hivit_jax.data.decode import BrokenImage, decode_label_map
from hivit_jax.errors import UserError
from tests.data.noise import Noise, png

ALL = ('image', 'segmentation', 'label')


def generator(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


@pytest.fixture
def nearest(monkeypatch):
  """Interpolates nothing, so that pixels and labels can be compared."""
  monkeypatch.setitem(transforms.INTERPOLATIONS, 'nearest', Image.Resampling.NEAREST)
  return {'interpolation': 'nearest'}


def test_a_label_map_that_is_painted_from_the_image_stays_equal_to_it(nearest):
  transform = transforms.train_transform((24, 40), keys=ALL, **nearest)
  mirrored = 0
  for i, example in enumerate(Noise(30)):
    row = transform(example, generator(i))
    assert row.keys() == set(ALL)
    assert (row['segmentation'].dtype, row['segmentation'].shape) == (np.uint8, (24, 40))
    assert (row['label'].dtype, row['label'].shape) == (np.int32, ())
    np.testing.assert_array_equal(row['segmentation'], row['image'][..., 0])
    assert row['label'] == i
    unmirrored = transforms.train_transform((24, 40), keys=ALL, flip=False, **nearest)
    mirrored += not np.array_equal(row['image'], unmirrored(example, generator(i))['image'])
  assert 5 < mirrored < 25


def test_the_same_crop_is_taken_with_and_without_a_label_map():
  example = Noise(1)[0]
  alone = transforms.train_transform(24)(example, generator())
  together = transforms.train_transform(24, keys=ALL)(example, generator())
  assert alone.keys() == {'image', 'label'}
  np.testing.assert_array_equal(alone['image'], together['image'])


def test_labels_are_never_mixed():
  """Where bicubic resizing invents colours, the labels are some of those that there were."""
  pixels = np.kron(generator().integers(0, 2, (9, 7), np.uint8) * 200, np.ones((5, 5), np.uint8))
  example = {'image': pixels, 'segmentation': pixels}
  for transform, args in (
    (transforms.train_transform(23, keys=ALL, channels=1), (generator(),)),
    (transforms.eval_transform(23, keys=ALL, channels=1), ()),
  ):
    row = transform(example, *args)
    assert set(np.unique(row['segmentation'])) == {0, 200}
    assert len(np.unique(row['image'])) > 2
    assert row['label'] == -1  # of an example without one


def test_evaluation_crops_the_label_map_as_it_crops_the_image(monkeypatch):
  resize = fields.resize
  monkeypatch.setattr(
    fields, 'resize', lambda example, size, _, step: resize(example, size, Image.NEAREST, step)
  )
  pixels = np.kron(generator().integers(0, 256, (9, 12), np.uint8), np.ones((4, 4), np.uint8))
  row = transforms.eval_transform((20, 28), keys=ALL, channels=1)(
    {'image': pixels, 'segmentation': pixels.astype(np.int64) * 3}
  )
  assert row['segmentation'].dtype == np.uint16  # the numbers do not fit into 8 bits
  np.testing.assert_array_equal(row['segmentation'], 3 * row['image'][..., 0].astype(int))


def test_boxes_follow_the_pixels(nearest):
  """A box around blocks of one colour has that colour in it afterwards, and nothing else."""
  steps = transforms.train_transform((48, 64), scale=(0.1, 0.4), **nearest).steps
  seen, left_out = 0, 0
  for i in range(40):
    pixels = np.zeros((60, 80), np.uint8)
    boxes = np.float32([[10, 5, 40, 25], [50, 30, 76, 58]])
    pixels[5:25, 10:40], pixels[30:58, 50:76] = 1, 2
    objects = {'boxes': boxes, 'classes': np.array([1, 2]), 'crowd': np.array([False, True])}
    example = {'image': Image.fromarray(pixels), 'objects': objects, 'name': 'x'}
    rng = generator(i)
    for step in steps:
      example = step(example, rng)
    moved, objects = np.asarray(example['image']), example['objects']
    assert example['name'] == 'x'
    assert objects['boxes'].dtype == np.float32
    assert set(objects['classes']) >= set(np.unique(moved)) - {0}
    np.testing.assert_array_equal(objects['crowd'], objects['classes'] == 2)
    left_out += 2 - len(objects['classes'])
    for box, number in zip(objects['boxes'], objects['classes'], strict=True):
      assert (box >= 0).all()
      assert (box <= [64, 48, 64, 48]).all()
      rows, columns = np.nonzero(moved == number)
      if len(rows):  # less than half a pixel may be left of an object, and then no pixel
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, found, atol=0.51)
        seen += 1
  assert seen > 30
  assert left_out > 5


@pytest.mark.parametrize(
  ('example', 'options', 'message'),
  [
    ({'depth': np.zeros((8, 8))}, {}, "RandomResizedCrop does not know what to do .* 'depth'"),
    (
      {'segmentation': np.zeros((8, 8), int)},
      {'rand_augment': 'rand-m9-inc1'},
      "RandAugment does not know what to do with the field 'segmentation'",
    ),
    (
      {'objects': {'boxes': np.float32([[0, 0, 8, 8]]), 'masks': [{'counts': b''}]}},
      {'scale': (1, 1)},
      r"RandomResizedCrop .* 'objects\.masks'",
    ),
    ({'objects': {'boxes': []}}, {}, "'objects' is a dict; the last step .* padded"),
    ({'segmentation': np.zeros((8, 8))}, {}, 'Label map of type float64'),
    ({'segmentation': np.full((8, 8), -1)}, {}, 'expected integers from 0 to 65535'),
  ],
)
def test_a_field_without_a_rule_is_an_error_that_names_field_and_step(example, options, message):
  transform = transforms.train_transform(8, keys=('image', *example), **options)
  with pytest.raises(UserError, match=message):
    transform({'image': np.zeros((8, 8, 3), np.uint8), **example}, generator())


def test_a_field_that_is_not_there_is_missed_with_those_that_are():
  transform = transforms.eval_transform(8, keys=('image', 'segmentation'))
  with pytest.raises(UserError, match="no 'segmentation' to learn from; the data set has: image"):
    transform({'image': np.zeros((8, 8, 3), np.uint8)})


def test_numbers_become_arrays_and_strings_stay_behind():
  arrays = fields.to_arrays({'a': 3, 'b': 0.5, 'c': True, 'd': np.int64(4), 'e': 'name'})
  assert {key: value.dtype for key, value in arrays.items()} == {
    'a': np.int32, 'b': np.float32, 'c': np.bool_, 'd': np.int32,
  }  # fmt: skip


# Label maps.


def encoded(image: Image.Image, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, 'PNG', **options)
  return buffer.getvalue()


def with_palette(labels: np.ndarray) -> Image.Image:
  image = Image.fromarray(labels).convert('P')
  image.putpalette([200, 10, 30] * 256)
  return image


@pytest.mark.parametrize(
  ('make', 'largest'),
  [
    (png, 255),
    (lambda x: png(x.astype(np.uint16)), 65535),
    (lambda x: png(x.astype(bool)), 1),
    (lambda x: encoded(with_palette(x)), 255),
    (lambda x: encoded(with_palette(x), bits=4), 15),
  ],
  ids=['8 bits', '16 bits', '1 bit', 'palette', 'palette of 4 bits'],
)
def test_labels_of_a_png_are_its_stored_numbers(make, largest):
  labels = generator().integers(0, largest + 1, (6, 9))
  labels = labels.astype(np.uint8 if largest < 256 else np.uint16)
  decoded = np.asarray(decode_label_map(make(labels)))
  np.testing.assert_array_equal(decoded, labels)
  assert decoded.dtype == labels.dtype


@pytest.mark.parametrize('bits', [2, 4])
def test_labels_of_few_grey_bits_are_not_stretched(bits):
  """As PNG optimisers write them; Pillow cannot, so the file is made by hand."""
  labels = generator().integers(0, 2**bits, (6, 8)).astype(np.uint8)
  packed = np.zeros((6, 8 * bits // 8), np.uint8)
  for column in range(8):
    byte, place = divmod(column * bits, 8)
    packed[:, byte] |= labels[:, column] << (8 - bits - place)

  def chunk(kind: bytes, data: bytes) -> bytes:
    checked = kind + data
    return struct.pack('>I', len(data)) + checked + struct.pack('>I', zlib.crc32(checked))

  file = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 6, bits, 0, 0, 0, 0))
  file += chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row.tobytes() for row in packed)))
  np.testing.assert_array_equal(decode_label_map(file + chunk(b'IEND', b'')), labels)


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'no image', 'label map: not an image'),
    (png(np.zeros((4, 4, 3), np.uint8)), 'label map: has mode RGB; expected one integer a pixel'),
    (png(np.zeros((400, 400), np.uint8))[:60], 'label map: '),
    (png(np.zeros((4, 5), np.uint8)), 'the image has 4x4 pixels, its label map 5x4'),
  ],
)
def test_a_damaged_label_map_is_a_broken_example(data, message):
  transform = transforms.eval_transform(8, keys=('image', 'segmentation'))
  with pytest.raises(BrokenImage, match=message):
    transform({'image': np.zeros((4, 4, 3), np.uint8), 'segmentation': data})
