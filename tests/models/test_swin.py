"""What is particular to Swin and SimMIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.models import swin
from hivit_jax.models.windows import join_windows, split_windows
from tests.helpers import assert_close, random_images

TINY = {
  'image_size': 64, 'embed_dim': 16, 'depths': (2, 2), 'num_heads': (2, 4), 'window_size': 4
}  # fmt: skip


@pytest.mark.parametrize('grid', [(8, 8), (8, 12)])
def test_the_mask_separates_what_only_the_shift_made_neighbours(grid):
  side, shift = 4, 2
  rows, columns = (np.arange(n) for n in grid)
  place = np.stack(np.meshgrid(rows, columns, indexing='ij'), axis=-1)  # (h, w, 2)
  shifted = np.roll(place, (-shift, -shift), axis=(0, 1))
  windows = np.asarray(split_windows(jnp.asarray(shifted)[None], side))[0]  # (W, N, 2)
  distance = np.abs(windows[:, :, None] - windows[:, None]).max(axis=-1)
  expected = np.where(distance < side, 0, -100)
  np.testing.assert_array_equal(swin.shift_mask(grid, side, shift), expected)
  assert (expected == 0).any(axis=-1).all()


def test_windows_are_cut_and_joined():
  x = random_images(2, 8, 12, 3)
  windows = split_windows(jnp.asarray(x), 4)
  assert windows.shape == (2, 6, 16, 3)
  np.testing.assert_array_equal(windows[1, 4].reshape(4, 4, 3), x[1, 4:8, 4:8])
  np.testing.assert_array_equal(join_windows(windows, (8, 12), 4), x)


def test_windows_exchange_what_they_know_by_shifting():
  """One pixel reaches its window after the first block, its neighbours after the second."""
  model = hivit_jax.create_model('swin_tiny', **TINY | {'depths': (2,), 'num_heads': (2,)})
  image = random_images(1, 64, 64, 3)

  def reached(blocks):
    def first(image):
      x = model.patch_embed(swin.cut_patches(image))
      for block in blocks:
        x = block(x)
      return x[0, 5, 5].sum()  # in the window of rows and columns 4 to 7

    gradient = jax.grad(first)(jnp.asarray(image))[0]
    patches = np.abs(gradient).reshape(16, 4, 16, 4, 3).sum(axis=(1, 3, 4)) > 0
    return np.argwhere(patches).min(axis=0), np.argwhere(patches).max(axis=0)

  blocks = model.layers[0].blocks
  np.testing.assert_array_equal(reached(blocks[:1]), [(4, 4), (7, 7)])
  np.testing.assert_array_equal(reached(blocks), [(0, 0), (7, 7)])


def test_images_that_windows_do_not_cover():
  with pytest.raises(UserError, match=r'windows of 4x4 do not cover a map of 18x18'):
    hivit_jax.create_model('swin_tiny', **TINY | {'image_size': 72})
  with pytest.raises(UserError, match=r'image_size must be multiples of 8 pixels, got 60x60'):
    hivit_jax.create_model('swin_tiny', **TINY | {'image_size': 60})


@pytest.fixture(scope='module')
def simmim():
  options = TINY | {'depths': (1, 1, 1, 1), 'num_heads': (1, 2, 4, 4), 'image_size': (64, 128)}
  return hivit_jax.create_model('simmim_swin_tiny', **options)


def test_simmim_masks_units_of_32_pixels_and_rounds_their_number_up(simmim):
  assert simmim.grid == (2, 4)
  out = jax.eval_shape(lambda x: simmim(x, rng=jax.random.key(0)), random_images(3, 64, 128, 3))
  assert out.pred.shape == (3, 8, 32 * 32 * 3)
  assert out.ids_keep.shape == (3, 3)  # 8 * 0.6 = 4.8 are masked, rounded up


def test_simmim_sees_no_masked_pixel_and_learns_from_no_other(simmim):
  images = jnp.asarray(random_images(2, 64, 128, 3))
  noise = jax.random.uniform(jax.random.key(1), (2, 8))

  @jax.jit
  def run(images):
    out, pullback = jax.vjp(lambda x: simmim(x, noise=noise).pred, images)
    return simmim(images, noise=noise), pullback(jnp.ones_like(out))[0]

  out, seen = run(images)
  mask = np.asarray(out.mask).reshape(2, 2, 4)
  assert (mask.sum(axis=(1, 2)) == 5).all()
  by_pixel = np.repeat(np.repeat(mask, 32, axis=1), 32, axis=2)[..., None] > 0
  by_pixel = np.broadcast_to(by_pixel, seen.shape)
  assert (np.asarray(seen)[by_pixel] == 0).all()
  assert (np.asarray(seen)[~by_pixel] != 0).mean() > 0.99
  # The loss is the mean absolute error of masked pixels.
  pred = np.asarray(out.pred).reshape(2, 2, 4, 32, 32, 3).swapaxes(2, 3).reshape(2, 64, 128, 3)
  assert_close(out.loss, np.abs(pred - images)[by_pixel].mean())


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'reach'),
  [
    ('swin_base_three_stages', [16, 32, 64]),
    ('swin_base_global', [16, 32, 128]),
    ('swin_base_mlp_stem', [4, 8, 128]),
  ],
)
def test_the_ladder_from_swin_to_hivit_changes_who_sees_whom(name, reach):
  """Pixels that the first cell of each stage depends on, along a side: window, map or cell."""
  options = {'image_size': 128, 'embed_dim': 16, 'depths': (1, 1, 1), 'window_size': 4}
  model = hivit_jax.create_model(name, **options)
  image = jnp.asarray(random_images(1, 128, 128, 3))
  seen = jax.jit(jax.jacrev(lambda x: jnp.stack([m[0, 0, 0, 0] for m in model.stages(x)])))
  pixels = np.abs(seen(image)).sum(axis=(1, -1)) > 0  # (stages, H, W)
  assert [int(np.argwhere(stage).max()) + 1 for stage in pixels] == reach


def test_global_attention_is_for_square_images():
  with pytest.raises(UserError, match='global attention take square images, not 64x128'):
    hivit_jax.create_model('swin_base_global', image_size=(64, 128), window_size=4)
