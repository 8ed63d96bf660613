"""RandAugment: timm's operations to the pixel, and the statistics of what is drawn."""

import collections
import itertools
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data.randaugment import OPERATIONS, RandAugment, rand_augment
from hivit_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'randaugment_ops.npz'
MEAN = (0.485, 0.456, 0.406)
SIGNS = {'pos': -1, 'neg': 1}  # The file is named by the random number that decided on the sign.
# What has no magnitude, or changes the image even at the weakest one.
NEVER_NEUTRAL = {'AutoContrast', 'Equalize', 'Invert', 'PosterizeIncreasing'}


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as file:
    return dict(file)


@pytest.fixture(scope='module')
def photo(golden):
  return Image.fromarray(golden['image'])


def apply(image: Image.Image, name: str, magnitude: float, sign: int, mean=MEAN) -> Image.Image:
  operation, fill = OPERATIONS[name], RandAugment(0, 0, 0, mean).fill(image.mode)
  return operation.apply(image, operation.argument(magnitude / 10, sign), fill)


def test_operations_and_fill_are_those_of_the_reference(golden):
  assert list(OPERATIONS) == list(dict.fromkeys(k.split('/')[0] for k in golden if '/' in k))
  mean = json.loads(str(golden['meta']))['hparams']['img_mean']
  assert rand_augment('rand-inc1', MEAN).fill('RGB') == tuple(mean)


@pytest.mark.parametrize('name', OPERATIONS)
def test_operation_equals_the_reference_to_the_pixel(golden, photo, name):
  arguments = json.loads(str(golden['meta']))['level_args']
  for magnitude in (3, 9):
    for label, sign in SIGNS.items():
      key = f'{name}/m{magnitude}/{label}'
      if arguments[key]:
        argument = OPERATIONS[name].argument(magnitude / 10, sign)
        assert argument == pytest.approx(arguments[key][0], rel=1e-12), key
      output = apply(photo, name, magnitude, sign)
      np.testing.assert_array_equal(output, golden[key], err_msg=key)


@pytest.mark.parametrize('name', OPERATIONS)
def test_no_magnitude_is_no_change_and_the_highest_works(photo, name):
  for sign in (1, -1):
    weakest, strongest = (np.asarray(apply(photo, name, m, sign)) for m in (0, 10))
    assert strongest.shape == (64, 96, 3)
    assert not np.array_equal(strongest, photo)
    if name not in NEVER_NEUTRAL:
      np.testing.assert_array_equal(weakest, photo)


def test_highest_magnitude_of_posterize_keeps_one_bit(photo):
  kept = np.asarray(apply(photo, 'PosterizeIncreasing', 10, 1))
  np.testing.assert_array_equal(kept, np.asarray(photo) & 0x80)


@pytest.mark.parametrize('name', OPERATIONS)
def test_greyscale_image_gets_what_each_channel_of_a_grey_one_gets(photo, name):
  grey = photo.convert('L')
  for sign in (1, -1):
    expected = np.asarray(apply(grey.convert('RGB'), name, 9, sign, mean=(0.3, 0.3, 0.3)))
    output = apply(grey, name, 9, sign, mean=(0.3, 0.3, 0.3))
    assert output.mode == 'L'
    for channel in range(3):
      np.testing.assert_array_equal(output, expected[..., channel])


def test_outside_is_the_mean_colour(photo):
  shifted = np.asarray(apply(photo, 'TranslateXRel', 10, 1))
  assert np.unique(shifted[:, 60:].reshape(-1, 3), axis=0).tolist() == [[124, 116, 104]]
  assert rand_augment('rand-inc1', MEAN).fill('L') == 114  # 255 * 0.449
  assert rand_augment('rand-inc1', (0.25,)).fill('L') == 64
  assert rand_augment('rand-inc1', (0.25,)).fill('RGB') == (64, 64, 64)


def test_draws_have_the_stated_distribution():
  rng, images = np.random.default_rng(0), 20_000
  step = rand_augment('rand-m9-mstd0.5-inc1', MEAN)
  draws = [step.draw(rng) for _ in range(images)]
  # Each of two with probability 1/2. Bounds are four standard deviations.
  lengths = collections.Counter(map(len, draws))
  assert set(lengths) == {0, 1, 2}
  for length, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
    assert lengths[length] / images == pytest.approx(share, abs=0.015)
  names, magnitudes, signs = zip(*itertools.chain(*draws), strict=True)
  for name in OPERATIONS:
    assert names.count(name) / images == pytest.approx(1 / 15, abs=0.008)
  # With replacement: the second is the first again as often as it is any other.
  pairs = [draw for draw in draws if len(draw) == 2]
  assert np.mean([a[0] == b[0] for a, b in pairs]) == pytest.approx(1 / 15, abs=0.015)
  assert set(signs) == {1, -1}
  assert np.mean(signs) == pytest.approx(0, abs=0.03)
  magnitudes = np.array(magnitudes)
  assert magnitudes.max() == 10
  assert np.mean(magnitudes == 10) == pytest.approx(0.0228, abs=0.005)  # Beyond two deviations.
  assert np.median(magnitudes) == pytest.approx(9, abs=0.02)
  quartiles = np.quantile(magnitudes, [0.25, 0.75])
  np.testing.assert_allclose(quartiles, [9 - 0.6745 * 0.5, 9 + 0.6745 * 0.5], atol=0.02)


def test_magnitude_is_clipped_below_too():
  rng, step = np.random.default_rng(0), rand_augment('rand-m0-mstd0.5-n4-inc1', MEAN)
  magnitudes = [m for _ in range(500) for _, m, _ in step.draw(rng)]
  assert min(magnitudes) == 0
  assert np.mean(np.array(magnitudes) == 0) == pytest.approx(0.5, abs=0.06)


def test_image_gets_exactly_what_is_drawn(photo):
  step, changed = rand_augment('rand-m9-mstd0.5-n3-inc1', MEAN), 0
  for seed in range(10):
    expected = photo
    for name, magnitude, sign in step.draw(np.random.default_rng(seed)):
      expected = apply(expected, name, magnitude, sign)
    augmented = step({'image': photo, 'label': 3}, np.random.default_rng(seed))
    np.testing.assert_array_equal(augmented['image'], expected)
    assert augmented['label'] == 3
    changed += expected is not photo
  assert changed >= 5


def test_specification_is_read_in_any_order():
  assert rand_augment('rand-m9-mstd0.5-inc1', MEAN) == RandAugment(9, 0.5, 2, MEAN)
  assert rand_augment('rand-inc1-n3-m7.5', [0.5]) == RandAugment(7.5, 0, 3, (0.5,))


@pytest.mark.parametrize(
  'spec',
  [
    'augmix-m3',
    'rand-m9-mstd0.5',  # not the increasing set
    'rand-m9-inc0',
    'rand-m11-inc1',
    'rand-m9-n0-inc1',
    'rand-m9-n1.5-inc1',
    'rand-m9-m8-inc1',
    'rand-m-inc1',
    'rand-m9-p0.3-inc1',
    'rand--inc1',
    'rand m9 inc1',
  ],
)
def test_wrong_specification_is_a_user_error_that_says_what_is_possible(spec):
  with pytest.raises(UserError, match=r'expected a string such as "rand-m9-mstd0.5-inc1"') as error:
    rand_augment(spec, MEAN)
  assert f'"{spec}"' in str(error.value)
