"""Transforms: the sampling and the resizing of the published recipes, on PIL images."""

import json
import math
import pickle
import re

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from hivit_jax.data import transforms
from hivit_jax.data.randaugment import RandAugment
from hivit_jax.errors import UserError
from tests.helpers import GOLDEN


def generator(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
  pixels = generator(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


def image_of(function, image: Image.Image, *args) -> np.ndarray:
  """What a step (of decoded examples) or a transform (of a source's) makes of an image alone."""
  whole = isinstance(function, transforms.TrainTransform | transforms.EvalTransform)
  return np.asarray(function({'image': np.asarray(image) if whole else image}, *args)['image'])


@pytest.mark.parametrize('output', [(16, 16), (16, 48)])
def test_crops_lie_in_the_image_and_within_scale_and_ratio(output):
  crop = transforms.RandomResizedCrop(output, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
  rng, width, height = generator(), 500, 375
  shares, ratios = [], []
  for _ in range(2000):
    left, top, right, bottom = crop.box(width, height, rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    shares.append((right - left) * (bottom - top) / (width * height))
    ratios.append((right - left) / (bottom - top) * output[0] / output[1])
  # One pixel of rounding on each side.
  assert 0.197 < min(shares) < 0.22
  assert max(shares) < 1.003
  assert 0.74 < min(ratios) < 0.77
  assert 1.30 < max(ratios) < 1.35


def test_crop_sampling_is_uniform_in_area_and_log_uniform_in_ratio():
  # Where every draw fits, nothing is rejected and the distributions are the plain ones.
  crop = transforms.RandomResizedCrop((16, 16), scale=(0.1, 0.5), ratio=(0.5, 2.0))
  rng = generator(1)
  boxes = np.array([crop.box(1000, 1000, rng) for _ in range(4000)])
  widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]

  def largest_deviation(values, low, high):  # Kolmogorov-Smirnov distance from uniform(low, high).
    ranks = (np.arange(len(values)) + 0.5) / len(values)
    return np.abs(np.sort((values - low) / (high - low)) - ranks).max()

  bound = 1.95 / math.sqrt(4000)  # Exceeded once in a thousand seeds.
  assert largest_deviation(widths * heights / 1e6, 0.1, 0.5) < bound
  assert largest_deviation(np.log(widths / heights), math.log(0.5), math.log(2)) < bound
  assert largest_deviation(boxes[:, 0] / (1000 - widths), 0, 1) < bound
  assert largest_deviation(boxes[:, 1] / (1000 - heights), 0, 1) < bound


@pytest.mark.parametrize(
  ('size', 'box'),
  [
    ((1000, 30), (480, 0, 520, 30)),  # 4:3 from the middle
    ((30, 1000), (0, 480, 30, 520)),  # 3:4 from the middle
    ((1, 1), (0, 0, 1, 1)),
  ],
)
def test_image_in_which_no_draw_fits_gives_its_largest_allowed_central_crop(size, box):
  crop = transforms.RandomResizedCrop((16, 16), scale=(1.0, 1.0))
  assert crop.box(*size, generator()) == box


def test_crop_equals_crop_then_bicubic_resize_and_nothing_bleeds_in():
  image = noise_image(200, 150)
  crop = transforms.RandomResizedCrop((32, 48))
  box = crop.box(200, 150, generator(3))
  expected = image.crop(box).resize((48, 32), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(image_of(crop, image, generator(3)), expected)
  image.paste((10, 200, 30), box)
  inside = image_of(crop, image, generator(3))
  assert np.unique(inside.reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]


class _Draws:
  """Stands for a random generator; gives what an official run has drawn."""

  def __init__(self, uniform: list[float], integers: list[tuple[int, int]]):
    self._uniform, self._integers = iter(uniform), iter(integers)

  def uniform(self, low: float, high: float) -> float:
    value = next(self._uniform)
    assert low - 1e-6 < value < high + 1e-6  # drawn in float32
    return value

  def integers(self, below: int) -> int:
    value, limit = next(self._integers)
    assert below == limit
    return value


def test_a_clamped_crop_is_that_of_the_official_linear_probe():
  golden = json.loads((GOLDEN / 'linprobe_crop.json').read_text())
  crop = transforms.RandomResizedCrop((224, 224), scale=(0.08, 1.0), clamp=True)
  clamped = 0
  for row in golden['rows']:
    width, height, share, log_ratio, top, left, h, w, top_below, left_below, _ = row
    rng = _Draws([share, log_ratio], [(top, top_below), (left, left_below)])
    assert crop.box(width, height, rng) == (left, top, left + w, top + h), row
    clamped += w == width or h == height
  assert clamped >= 100
  assert len(golden['rows']) == 270


def test_a_clamped_crop_takes_more_of_an_image():
  """Half of a photograph on average; without, large crops are the ones that are drawn again."""
  for clamp, expected in ((True, 0.52), (False, 0.43)):  # of the official code
    crop = transforms.RandomResizedCrop((224, 224), scale=(0.08, 1.0), clamp=clamp)
    rng = generator()
    boxes = np.array([crop.box(500, 375, rng) for _ in range(4000)])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert abs(areas.mean() / (500 * 375) - expected) < 0.015
  assert transforms.RandomResizedCrop((8, 8), clamp=True).box(1, 1, generator()) == (0, 0, 1, 1)


@pytest.mark.parametrize(
  ('interpolation', 'key'), [('bilinear', 'resized'), ('bicubic', 'bicubic')]
)
def test_crops_are_resized_as_officially(monkeypatch, interpolation, key):
  """SimMIM's are bilinear, MAE's are bicubic; pixel by pixel."""
  crop = transforms.RandomResizedCrop((32, 32), interpolation=interpolation)
  with np.load(GOLDEN / 'simmim_crop.npz') as file:
    golden = {name: file[name] for name in file.files}
  names = [name for name in golden if re.fullmatch(rf'\d/{key}\d', name)]
  assert len(names) >= 6
  for name in names:
    case, number = name.split('/')[0], name[-1]
    top, left, height, width = golden[f'{case}/box{number}_top_left_height_width'].tolist()
    box = (left, top, left + width, top + height)
    monkeypatch.setattr(transforms.RandomResizedCrop, 'box', lambda *_, box=box: box)
    result = image_of(crop, Image.fromarray(golden[f'{case}/image_rgb']), generator())
    np.testing.assert_array_equal(result, golden[name], err_msg=name)


def test_resizing_is_antialiased():
  # One-pixel stripes of black and white have no content that survives an eightfold reduction.
  stripes = Image.fromarray(np.tile(np.uint8([[0, 255]]), (512, 256)))
  crop = transforms.RandomResizedCrop((64, 64), scale=(1.0, 1.0), ratio=(1.0, 1.0))
  inside = image_of(crop, stripes, generator()).astype(int)[:, 2:-2]
  assert np.abs(inside - 127).max() <= 2
  evaluated = image_of(transforms.eval_transform(64), stripes)
  assert np.ptp(evaluated[:, 2:-2].astype(int)) <= 60


def test_flip_mirrors_half_of_the_images():
  image, flip, rng = noise_image(8, 8), transforms.RandomFlip(), generator()
  outcomes = [image_of(flip, image, rng) for _ in range(400)]
  straight = sum(np.array_equal(array, image) for array in outcomes)
  mirrored = sum(np.array_equal(array, np.asarray(image)[:, ::-1]) for array in outcomes)
  assert straight + mirrored == 400
  assert 160 < mirrored < 240


def test_train_transform_is_crop_then_flip_as_uint8_and_a_function_of_the_generator():
  transform = transforms.train_transform((32, 48), scale=(0.3, 0.9))
  image = noise_image(100, 80)
  assert transform.steps[0] == transforms.RandomResizedCrop((32, 48), (0.3, 0.9), (3 / 4, 4 / 3))
  first = image_of(transform, image, generator(1))
  assert first.shape == (32, 48, 3)
  assert first.dtype == np.uint8
  np.testing.assert_array_equal(first, image_of(transform, image, generator(1)))
  assert not np.array_equal(first, image_of(transform, image, generator(2)))


def test_classifiers_get_crop_flip_and_rand_augment_instead_of_colour_jitter():
  crop = transforms.RandomResizedCrop((32, 32), (0.08, 1.0), (3 / 4, 4 / 3))
  options = {'scale': (0.08, 1.0), 'color_jitter': 0.4}
  jittered = transforms.train_transform(32, **options)
  assert jittered.steps == (crop, transforms.RandomFlip(), transforms.ColorJitter(0.4))
  augmented = transforms.train_transform(
    32, **options, rand_augment='rand-m9-mstd0.5-inc1', mean=(0.1, 0.2, 0.3)
  )
  rand_augment = RandAugment(9.0, 0.5, 2, (0.1, 0.2, 0.3))
  assert augmented.steps == (crop, transforms.RandomFlip(), rand_augment)
  for off in (None, ''):
    assert transforms.train_transform(32, rand_augment=off).steps[2:] == ()

  image, rng = noise_image(50, 40), generator(5)
  expected = {'image': image}
  for step in (crop, transforms.RandomFlip(), rand_augment):
    expected = step(expected, rng)
  result = image_of(augmented, image, generator(5))
  np.testing.assert_array_equal(result, expected['image'])


@pytest.mark.parametrize(('amount', 'low', 'high'), [(0.4, 0.6, 1.4), (1.5, 0.0, 2.5)])
def test_colour_jitter_draws_every_order_and_factors_uniformly(amount, low, high):
  jitter, rng = transforms.ColorJitter(amount), generator()
  draws = [jitter.draw(rng) for _ in range(3000)]
  orders = [tuple(change for change, _ in draw) for draw in draws]
  changes = {ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color}
  assert all(set(order) == changes for order in orders)
  assert len(set(orders)) == 6
  assert all(420 < orders.count(order) < 580 for order in set(orders))
  for change in changes:
    factors = np.array([dict(draw)[change] for draw in draws])
    assert low <= factors.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < factors.max() <= high
    assert factors.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_colour_jitter_applies_what_it_draws(mode):
  image, jitter = noise_image(9, 7).convert(mode), transforms.ColorJitter(0.4)
  expected = image
  for change, factor in jitter.draw(generator(2)):
    expected = change(expected).enhance(factor)
  jittered = jitter({'image': image}, generator(2))['image']
  assert jittered.mode == mode
  np.testing.assert_array_equal(jittered, expected)
  assert not np.array_equal(jittered, image)


def test_without_flip_nothing_is_mirrored():
  transform = transforms.train_transform(16, channels=1, scale=(1, 1), ratio=(1, 1), flip=False)
  ramp = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1)))
  rng = generator()
  for _ in range(20):
    assert (np.diff(image_of(transform, ramp, rng)[..., 0].astype(int), axis=1) > 0).all()


def test_greyscale_keeps_one_channel():
  image, options = noise_image(40, 30), {'channels': 1}
  assert image_of(transforms.train_transform(16, **options), image, generator()).shape == (
    16,
    16,
    1,
  )
  assert image_of(transforms.eval_transform(16, **options), image).shape == (16, 16, 1)


@pytest.mark.parametrize(
  ('side', 'image_size', 'resized', 'corner'),
  [
    (224, (500, 375), (341, 256), (58, 16)),  # 341.33 is cut off, 58.5 rounds to even
    (224, (375, 500), (256, 341), (16, 58)),
    (192, (500, 375), (292, 219), (50, 14)),  # int(192 * 256 / 224) = 219
    (256, (500, 375), (341, 256), (42, 0)),  # no margin above 224
    (64, (32, 32), (73, 73), (4, 4)),
  ],
)
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(
  side, image_size, resized, corner
):
  image = noise_image(*image_size)
  left, top = corner
  expected = image.resize(resized, Image.Resampling.BICUBIC)
  expected = expected.crop((left, top, left + side, top + side))
  np.testing.assert_array_equal(image_of(transforms.eval_transform(side), image), expected)


@pytest.mark.parametrize('image_size', [(500, 375), (375, 501), (64, 64), (97, 333)])
def test_evaluation_is_that_of_torchvision_for_every_size(image_size):
  image = noise_image(*image_size)
  for side in (32, 90, 96, 160, 192, 200, 223, 224, 225, 288):
    shorter = int(side * 256 / 224) if side <= 224 else side
    longer = int(shorter * max(image_size) / min(image_size))
    wide = image.width > image.height
    resized = image.resize((longer, shorter) if wide else (shorter, longer), Image.BICUBIC)
    top, left = round((resized.height - side) / 2.0), round((resized.width - side) / 2.0)
    expected = np.asarray(resized)[top : top + side, left : left + side]
    np.testing.assert_array_equal(image_of(transforms.eval_transform(side), image), expected)


@pytest.mark.parametrize('output', [(64, 128), (128, 64), (256, 320)])
@pytest.mark.parametrize('image_size', [(500, 375), (375, 500), (97, 101), (40, 400)])
def test_non_square_evaluation_covers_the_output_without_distortion(output, image_size):
  # A coordinate grid as the image: its slope in the output is the magnification in each direction.
  width, height = image_size
  rows, columns = np.mgrid[0:height, 0:width]
  grid = np.stack([255 * columns / width, 255 * rows / height, 0 * rows], -1)
  array = image_of(transforms.eval_transform(output), Image.fromarray(grid.astype(np.uint8)))
  assert array.shape == (*output, 3)
  h, w = output
  margin = 256 / 224 if max(output) <= 224 else 1
  zoom = max(margin * h / height, margin * w / width)
  seen_x = np.ptp(array[..., 0].astype(int)) / 255 * width * zoom
  seen_y = np.ptp(array[..., 1].astype(int)) / 255 * height * zoom
  assert seen_x == pytest.approx(w, rel=0.1, abs=3)
  assert seen_y == pytest.approx(h, rel=0.1, abs=3)


@pytest.mark.parametrize('size', [0, -16, (), (16, 0), (16.0, 16.0), (16, 16, 3)])
def test_senseless_size_is_a_user_error(size):
  for make in (transforms.train_transform, transforms.eval_transform):
    with pytest.raises(UserError, match=r'expected a side or \(height, width\)'):
      make(size)


@pytest.mark.parametrize(
  'options', [{'scale': (0, 1)}, {'scale': (0.5, 0.2)}, {'scale': (0.5, 1.5)}, {'ratio': (0, 1)}]
)
def test_senseless_crop_is_a_user_error(options):
  with pytest.raises(UserError, match='expected 0 <'):
    transforms.train_transform(16, **options)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'color_jitter': -0.4}, r'Colour jitter -0\.4: expected 0'),
    ({'rand_augment': 'rand-m9', 'color_jitter': -1.0}, 'Colour jitter'),
    ({'rand_augment': 'augmix'}, 'RandAugment "augmix": expected'),
    ({'channels': 65}, 'channels=65: expected a number from 1 to 64'),
  ],
)
def test_senseless_augmentation_is_a_user_error(options, message):
  with pytest.raises(UserError, match=message):
    transforms.train_transform(16, **options)


def test_transforms_travel_to_worker_processes():
  for transform in (
    transforms.train_transform((16, 32), color_jitter=0.4),
    transforms.train_transform(16, rand_augment='rand-m9-mstd0.5-inc1'),
    transforms.eval_transform(16),
  ):
    assert pickle.loads(pickle.dumps(transform)) == transform
