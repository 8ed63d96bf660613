"""Random erasing, mixup and cutmix: what they do, how often, and how evenly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.tasks import mixing
from tests.helpers import GOLDEN, assert_close

H, W = 24, 32


def _batch(b: int = 6) -> tuple[np.ndarray, np.ndarray]:
  """Images whose every value tells example and place, and their one-hot targets."""
  images = np.arange(b * H * W * 2, dtype=np.float32).reshape(b, H, W, 2)
  return images, np.eye(b, dtype=np.float32)


def _mixed(number: int, **options):
  images, targets = _batch()
  options = {'mixup': 0.8, 'cutmix': 1.0, 'switch_probability': 0.5} | options
  return images, *map(np.asarray, mixing.mix(images, targets, jax.random.key(number), **options))


def _box(images: np.ndarray, mixed: np.ndarray) -> tuple[slice, slice] | None:
  """Where the first image was replaced; checks that it is one rectangle, the same in all images."""
  changed = mixed != images
  assert (changed == changed[:1, :, :, :1]).all()
  rows, columns = np.nonzero(changed[0, :, :, 0])
  if not len(rows):
    return None
  box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
  assert changed[0, :, :, 0][box].all()
  return box


def test_mixup_blends_images_and_targets_by_the_same_share():
  shares = []
  for number in range(40):
    images, mixed, targets = _mixed(number, cutmix=0.0)
    share = targets[0, 0]
    shares.append(share)
    np.testing.assert_allclose(mixed, share * images + (1 - share) * images[::-1], rtol=1e-4)
    np.testing.assert_allclose(targets, share * np.eye(6) + (1 - share) * np.eye(6)[::-1])
  assert min(shares) < 0.1 < 0.9 < max(shares)  # Beta(0.8, 0.8) likes the ends


def test_cutmix_pastes_a_box_and_the_targets_tell_its_area():
  boxes = []
  for number in range(60):
    images, mixed, targets = _mixed(number, mixup=0.0)
    box = _box(images, mixed)
    area = 0
    if box is not None:
      np.testing.assert_array_equal(mixed[:, *box], images[::-1][:, *box])
      area = mixed[0, *box, 0].size
      boxes.append(box)
    np.testing.assert_allclose(targets[0, 0], 1 - area / (H * W), atol=1e-6)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
  assert any(rows.start == 0 or rows.stop == H for rows, _ in boxes)  # boxes are cut at the border
  assert len({rows.start for rows, _ in boxes}) > 10


def test_cutmix_boxes_have_the_shape_of_the_image_and_are_centred_anywhere():
  """Height and width are the same share of the sides: those of timm, rounded down twice."""
  for number in range(30):
    images, mixed, _ = _mixed(number, mixup=0.0)
    box = _box(images, mixed)
    if box and box[0].start > 0 and box[0].stop < H and box[1].start > 0 and box[1].stop < W:
      height, width = box[0].stop - box[0].start, box[1].stop - box[1].start
      assert height % 2 == width % 2 == 0
      assert abs(height / H - width / W) < 2 / H


def test_a_batch_is_mixed_in_one_way_and_both_ways_are_as_likely_as_asked():
  count = {0.5: 0, 0.9: 0}
  for probability in count:
    for number in range(100):
      images, mixed, _ = _mixed(number, switch_probability=probability)
      pasted = ((mixed == images) | (mixed == images[::-1])).all()
      count[probability] += bool(pasted)
  assert 35 <= count[0.5] <= 65
  assert 80 <= count[0.9] <= 98


@functools.cache
def _golden() -> dict[str, np.ndarray]:
  with np.load(GOLDEN / 'mixup_groups.npz') as file:
    return {key: file[key] for key in file.files}


@pytest.mark.parametrize('group', [4, 8, 24])
def test_groups_are_mixed_as_by_timm(group):
  """Each as the batch of one GPU and accumulation step, from the same draws."""
  golden = _golden()
  own = {
    key.removeprefix(f'groups_of_{group}/'): value
    for key, value in golden.items()
    if key.startswith(f'groups_of_{group}/')
  }
  images = golden['image_nchw'].transpose(0, 2, 3, 1)
  targets = 0.9 * np.eye(7, dtype=np.float32)[golden['label']] + 0.1 / 7
  assert 0 < own['use_cutmix'].sum() < max(2, len(own['use_cutmix']))
  mixes = mixing.Mix(
    np.float32(own['lam_used']), own['use_cutmix'], own['box_top_bottom_left_right']
  )
  mixed, mixed_targets = mixing.apply_mix(images, targets, mixes, group)
  assert_close(mixed.transpose(0, 3, 1, 2), own['mixed_nchw'], relative=1e-6)
  assert_close(mixed_targets, own['targets'], relative=1e-6)


def test_the_box_of_cutmix_is_that_of_timm():
  heights, widths, share, y, x, *box, left = _golden()['boxes'].T
  assert len(share) == 60
  for h, w in {(16, 20), *zip(heights, widths, strict=True)}:
    chosen = (heights == h) & (widths == w)
    pick = lambda v, kind=np.int32: v[chosen].astype(kind)  # noqa: B023, E731
    ours, rest = mixing.cutmix_box(pick(share, np.float32), pick(y), pick(x), int(h), int(w))
    np.testing.assert_array_equal(ours, np.stack([pick(side) for side in box], axis=-1))
    np.testing.assert_allclose(rest, pick(left, np.float32), atol=1e-6)


def test_the_last_group_may_be_smaller_and_mixes_within_itself():
  images, targets = _batch(11)
  mixes = mixing.Mix(
    np.float32([0.5, 0.25, 0.75]), np.bool_([False, True, False]),
    np.int32([[0, 0, 0, 0], [0, H // 2, 0, W], [0, 0, 0, 0]]),
  )  # fmt: skip
  mixed, mixed_targets = mixing.apply_mix(images, targets, mixes, 4)
  partners = [3, 2, 1, 0, 7, 6, 5, 4, 10, 9, 8]
  share = np.repeat(mixes.share, 4)[:11, None]
  expected = targets * share + targets[partners] * (1 - share)
  np.testing.assert_allclose(mixed_targets, expected, rtol=1e-6)
  expected = images * share[..., None, None] + images[partners] * (1 - share[..., None, None])
  expected[4:8, : H // 2] = images[[7, 6, 5, 4], : H // 2]
  expected[4:8, H // 2 :] = images[4:8, H // 2 :]
  np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_groups_are_drawn_one_by_one():
  images, targets = _batch(22)
  options = {'mixup': 0.8, 'cutmix': 1.0, 'switch_probability': 0.5}
  mixed, mixed_targets = map(
    np.asarray, mixing.mix(images, targets, jax.random.key(0), **options, group=2)
  )
  shares = mixed_targets[np.arange(22), np.arange(22)]
  np.testing.assert_array_equal(shares[::2], shares[1::2])  # partners share a draw
  assert len(set(shares[::2].round(6))) >= 10
  partners = np.arange(22) ^ 1
  cut = ((mixed == images) | (mixed == images[partners])).all(axis=(1, 2, 3))
  assert 4 <= cut.sum() <= 18
  for whole in (None, 0, 22, 100):
    again = mixing.mix(images, targets, jax.random.key(0), **options, group=whole)
    one = mixing.mix(images, targets, jax.random.key(0), **options, group=22)
    jax.tree.map(np.testing.assert_array_equal, again, one)


@pytest.mark.parametrize('erased', [0.25, 1.0])
def test_erasing_puts_normal_noise_into_one_box_an_image(erased):
  b, h, w = 400, 32, 48
  images = np.full((b, h, w, 3), 100, np.float32)
  result = np.asarray(mixing.random_erase(images, jax.random.key(0), erased))
  changed = (result != images).any(axis=-1)
  assert (changed == (result != images).all(axis=-1)).all()
  share = changed.any(axis=(1, 2)).mean()
  assert abs(share - erased) < 0.08
  noise = result[changed]
  assert abs(noise.mean()) < 0.02
  assert abs(noise.std() - 1) < 0.02
  areas, aspects, tops = [], [], []
  for mask in changed:
    rows, columns = np.nonzero(mask)
    if len(rows):
      height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
      assert mask.sum() == height * width
      areas.append(height * width / (h * w))
      aspects.append(height / width)
      tops.append(rows.min())
  assert 0.015 < min(areas) < 0.04
  assert 0.29 < max(areas) < 0.36
  assert 0.2 < min(aspects) < 0.45
  assert max(aspects) < 3.8
  assert abs(np.mean(np.array(aspects) > 1) - 0.5) < 0.2
  assert min(tops) == 0


def test_noise_differs_between_images_and_is_a_function_of_the_key():
  images = jnp.zeros((2, H, W, 3))
  one, again = (mixing.random_erase(images, jax.random.key(3), 1.0) for _ in range(2))
  np.testing.assert_array_equal(one, again)
  values = [np.asarray(image[image != 0]) for image in one]
  assert not np.intersect1d(*values).size
