"""RoIAlign and mask targets against mmcv's numbers.

A fixed number of samples a bin, `size7_ratio2` and `size14_ratio2` of the golden file, is not here:
the published detector adapts it to the RoI.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.data import masks, scenes
from hivit_jax.detection import boxes, mask_targets, roi_align
from tests.helpers import assert_close, load_golden

STRIDES = (4, 8, 16, 32)


def unpack(packed, *shape):
  count = np.prod(shape)
  return np.unpackbits(packed, axis=-1)[..., :count].reshape(*packed.shape[:-1], *shape)


@pytest.fixture(scope='module')
def golden():
  _, arrays = load_golden('roi_align.npz')
  return arrays


@pytest.fixture(scope='module')
def polygons():
  config, arrays = load_golden('mask_targets.npz')
  return config, arrays, unpack(arrays['bitmaps'], config['height'], config['width'])


def channels_last(x):
  return np.moveaxis(np.asarray(x, np.float64), -3, -1)


def test_levels_equal_the_official_ones(golden):
  for kind in ('', 'boundary_'):
    found = roi_align.level_of(jnp.asarray(golden[f'{kind}rois'][:, 1:]))
    np.testing.assert_array_equal(found, golden[f'{kind}levels'])


@pytest.mark.parametrize('size', [7, 14])
def test_features_and_gradients_equal_the_official_ones(golden, size):
  images, rois = golden['rois'][:, 0].astype(int), golden['rois'][:, 1:].astype(np.float64)
  maps = [channels_last(golden[f'features/{i}']) for i in range(4)]
  weights = channels_last(golden[f'weights/{size}'])
  most = int(golden[f'samples/{size}'].max())

  @jax.jit
  def pooled(maps, rois):
    def of_image(maps):  # all RoIs on each image, of which the own one's are used
      return roi_align.roi_align(maps, rois, STRIDES, size, samples=most, chunk=10)

    everywhere = jax.vmap(of_image)(maps)
    return everywhere[images, jnp.arange(len(images))]

  with jax.enable_x64(True):
    found, pull = jax.vjp(pooled, maps, rois)
    gradients, of_rois = pull(jnp.asarray(weights))
    assert not np.any(of_rois)
    name = f'size{size}_ratio0'
    assert_close(found, channels_last(golden[f'{name}/pooled']))
    for i, gradient in enumerate(gradients):
      assert_close(gradient, channels_last(golden[f'{name}/grad_features/{i}']))


def test_a_larger_canvas_changes_nothing():
  rng = np.random.default_rng(0)
  features = rng.standard_normal((6, 9, 3)).astype(np.float32)
  corner = rng.random((20, 2)) * 40 - 10
  rois = np.concatenate([corner, corner + rng.random((20, 2)) * 60], 1).astype(np.float32)
  small = roi_align.roi_align([features], rois, [4], 7)
  canvas = np.full((10, 16, 3), 100, np.float32)
  canvas[:6, :9] = features
  large = roi_align.roi_align([canvas], rois, [4], 7, own=[(6, 9)])
  np.testing.assert_allclose(small, large, atol=1e-5)


def test_mask_targets_from_whole_bitmaps_equal_the_official_ones(polygons):
  config, arrays, bitmaps = polygons
  limits = np.tile([config['width'], config['height']], 2)
  rois = arrays['rois'].astype(np.float64).clip(0, limits)
  with jax.enable_x64(True):
    found = [
      roi_align.roi_align([bitmaps[i][..., None].astype(np.float64)], roi[None], [1], 28)[0, ..., 0]
      for i, roi in zip(arrays['gt_index'], rois, strict=True)
    ]
  assert_close(np.stack(found), arrays['targets_soft'])


def test_mask_targets_from_crops_differ_in_hardly_any_pixel(polygons):
  config, arrays, bitmaps = polygons
  rois = boxes.clip(jnp.asarray(arrays['rois']), (config['height'], config['width']))
  crops = np.stack([masks.crop(m, b) for m, b in zip(bitmaps, arrays['boxes'], strict=True)])
  owner = arrays['gt_index']
  found = mask_targets.mask_targets(
    jnp.asarray(crops[owner]), jnp.asarray(arrays['boxes'][owner]), rois
  )
  expected = unpack(arrays['targets'], 28, 28)
  share = (np.asarray(found) != expected).mean()
  assert 0.1 < expected.mean() < 0.9
  assert share < 0.005, share


def test_a_crop_keeps_the_area_of_its_mask(polygons):
  _, arrays, bitmaps = polygons
  for bitmap, box in zip(bitmaps, arrays['boxes'], strict=True):
    cropped = masks.crop(bitmap, box)
    area = (cropped / 255).mean() * float(boxes.area(jnp.asarray(box)))
    assert abs(area - bitmap.sum()) < 0.002 * bitmap.sum() + 1


def test_resized_and_mirrored_masks_equal_the_official_ones(polygons):
  _, arrays, bitmaps = polygons
  image = np.zeros((*bitmaps.shape[1:], 3), np.uint8)
  none = np.zeros(len(bitmaps), np.int32)
  scene = scenes.Scene(image, arrays['boxes'], none, bitmaps, none.astype(bool))
  changed = {'flipped': scenes.mirror(scene)}
  for name in ('rescaled_up', 'rescaled_down'):
    changed[name] = scenes.resize(scene, tuple(map(int, arrays[f'{name}_shape'])))
  for name, found in changed.items():
    np.testing.assert_array_equal(found.masks, unpack(arrays[name], *found.size), name)


def test_pasted_masks_equal_the_official_ones(polygons):
  config, arrays, _ = polygons
  size = config['height'], config['width']
  expected = unpack(arrays['paste/masks'], *size)
  for i, (prob, box) in enumerate(zip(arrays['paste/prob'], arrays['paste/boxes'], strict=True)):
    found = masks.paste(prob, box, size)
    if i < len(arrays['paste/soft']):
      np.testing.assert_allclose(found[40:72, 32:96], arrays['paste/soft'][i], atol=2e-5)
    unclear = np.abs(found - 0.5) < 1e-5
    assert ((found >= 0.5) == expected[i])[~unclear].all()
    assert unclear.sum() < 5
