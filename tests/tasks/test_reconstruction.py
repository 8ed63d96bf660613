"""Pictures of reconstructions: the right pixels at the right places, labelled."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw

from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.masking import MAEOutput, kept_units, random_masking
from hivit_jax.tasks import reconstruction
from hivit_jax.tasks.images import Display, denormalize, normalize
from tests.helpers import TINY_MAE, TINY_SWIN, random_model

STATISTICS = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
NOTE = 'mean and variance of predicted units are the true ones'


def _photos(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
  """Noise of every level; the first unit flat, which has no variance to normalise by."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, height, width, channels), np.uint8)
  images[:, :16, :16] = 77
  return images


class _Perfect:
  """Predicts its target, which is what training would lead to in the end."""

  predicts = 'pixels'

  def __init__(self, norm_pix_loss: bool, grid: tuple[int, int]):
    self.norm_pix_loss = norm_pix_loss
    self.grid = grid

  def __call__(self, images, *, noise, mask_ratio=None):
    keep = kept_units(noise.shape[1], mask_ratio or 0.75)
    ids_keep, ids_restore, mask = random_masking(noise, keep)
    target = MaskedAutoencoder.target(self, images)
    return MAEOutput(
      loss=target.mean(), pred=target, mask=mask, ids_keep=ids_keep, ids_restore=ids_restore
    )


def test_normalize_and_back():
  images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
  normalized = np.asarray(normalize(images, **STATISTICS))
  expected = (images / 255 - STATISTICS['mean']) / STATISTICS['std']
  np.testing.assert_allclose(normalized, expected, atol=1e-5)
  display = Display.of(images)
  np.testing.assert_array_equal(display(denormalize(normalized, **STATISTICS)), images)
  far = denormalize(np.array([[-9.0, 0.0, 9.0]]), **STATISTICS)
  assert display(far).tolist() == [[0, 116, 255]]
  # One channel takes the statistics' average.
  grey = np.asarray(normalize(images[..., :1], **STATISTICS))
  np.testing.assert_allclose(grey[0, 15, 15], (1 - 0.449) / 0.226, rtol=1e-5)


@pytest.mark.parametrize('norm_pix', [True, False])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_perfect_prediction_gives_the_image_back(norm_pix, channels):
  images = _photos(3, 48, 32, channels)
  noise = np.random.default_rng(1).random((3, 6), np.float32)
  model = _Perfect(norm_pix, (3, 2))
  pixels, mask = reconstruction.predict_pixels(model, images, noise, **STATISTICS, mask_ratio=0.5)
  result = reconstruction.assemble(images, pixels, mask, norm_pix=norm_pix, **STATISTICS)
  difference = np.abs(result.pasted.astype(int) - images)
  assert difference.max() <= 1
  assert np.mean(difference) < 0.01
  assert result.mask_ratio == 0.5
  assert result.norm_pix is norm_pix


def test_units_are_hidden_and_pasted_where_the_mask_says():
  images = _photos(2, 32, 48)
  mask = np.array([[1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1]], np.float32)
  predicted = np.full(images.shape, 200, np.uint8)
  pixels = (predicted / 255 - STATISTICS['mean']) / STATISTICS['std']
  result = reconstruction.assemble(images, pixels, mask, norm_pix=True, **STATISTICS)
  np.testing.assert_array_equal(result.original, images)
  for b in range(2):
    for n in range(6):
      row, column = divmod(n, 3)
      unit = (b, slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
      if mask[b, n]:
        assert (result.masked[unit] == 128).all()
        assert (result.pasted[unit] == 200).all()
        assert (result.reconstruction[unit] == 200).all()
      else:
        np.testing.assert_array_equal(result.masked[unit], images[unit])
        assert (result.reconstruction[unit] == 128).all()
        np.testing.assert_array_equal(result.pasted[unit], images[unit])


def test_reconstructor_is_a_function_of_the_seed():
  graphdef, params = random_model('mae_hivit_tiny', **TINY_MAE | {'image_size': (32, 64)})
  images = _photos(2, 32, 64)
  pictures = reconstruction.Reconstructor(graphdef, **STATISTICS, mask_ratio=0.5)
  first, again, other = (pictures(params, images, seed=seed) for seed in (0, 0, 1))
  hidden = [(r.masked == 128).all(axis=-1) for r in (first, again, other)]
  assert [h.mean().round(1) for h in hidden] == [0.5, 0.5, 0.5]
  np.testing.assert_array_equal(first.pasted, again.pasted)
  assert (hidden[0] != hidden[2]).any()
  assert first.mask_ratio == 0.5
  assert first.norm_pix
  np.testing.assert_array_equal(first.pasted[~hidden[0]], images[~hidden[0]])
  # The model's pictures, not only its masks: other parameters predict other pixels.
  other = nnx.merge(graphdef, params).decoder_pred.bias[...] + 1
  params = params | {'decoder_pred': params['decoder_pred'] | {'bias': other}}
  changed = pictures(params, images, seed=0)
  assert (changed.reconstruction != first.reconstruction).any()


def test_simmims_units_are_of_32_pixels():
  """Every unit is predicted to be one picture, whose pixels its bias has channel by channel."""
  options = {'image_size': (64, 128), 'depths': (1, 1, 1, 1), 'num_heads': (1, 2, 2, 2)}
  graphdef, params = random_model('simmim_swin_tiny', **TINY_SWIN | options)
  predicted = _photos(1, 32, 32)[0]
  pixels = np.asarray(normalize(predicted, **STATISTICS))
  decoder = params['decoder'][0]
  decoder |= {'kernel': 0 * decoder['kernel'], 'bias': pixels.transpose(2, 0, 1).ravel()}
  images = _photos(1, 64, 128)
  result = reconstruction.Reconstructor(graphdef, **STATISTICS)(params, images, seed=0)
  assert not result.norm_pix
  hidden = 0
  for row in range(0, 64, 32):
    for column in range(0, 128, 32):
      unit = (0, slice(row, row + 32), slice(column, column + 32))
      is_hidden = (result.masked[unit] == 128).all()
      np.testing.assert_array_equal(result.pasted[unit], predicted if is_hidden else images[unit])
      hidden += is_hidden
  assert hidden == 5  # of 8, 60 % rounded up


# --- drawing


def _plain_result(height, width, *, channels=3, count=2, norm_pix=True):
  """Four panels, each of one colour."""
  colours = ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0))
  panels = [np.full((count, height, width, 3), c, np.uint8)[..., :channels] for c in colours]
  return reconstruction.Reconstruction(*panels, mask_ratio=0.75, norm_pix=norm_pix), colours


@pytest.mark.parametrize(
  ('height', 'width', 'scale'), [(32, 32, 5), (48, 96, 3), (160, 144, 1), (224, 224, 1)]
)
def test_panels_are_in_order_and_enlarged_by_whole_factors(height, width, scale):
  result, colours = _plain_result(height, width)
  canvas = np.asarray(reconstruction.draw(result, title='a title'))
  lefts, tops = [], []
  for colour in colours:
    rows, columns = np.nonzero((canvas == colour).all(axis=-1))
    assert len(rows) == 2 * height * width * scale**2
    assert np.ptp(columns) + 1 == width * scale
    assert len(np.unique(rows)) == 2 * height * scale
    lefts.append(columns.min())
    tops.append(rows.min())
  assert lefts == sorted(lefts)
  assert len(set(tops)) == 1
  assert min(np.diff(lefts)) > width * scale  # a margin between them


def test_panels_show_the_pixels_of_each_image():
  images = _photos(2, 32, 32)
  result = reconstruction.Reconstruction(*[images] * 4, mask_ratio=0.5, norm_pix=False)
  canvas = np.asarray(reconstruction.draw(result))
  enlarged = np.asarray(Image.fromarray(images[1]).resize((160, 160), Image.NEAREST))
  found = [
    (y, x)
    for y, x in np.argwhere((canvas[:-159, :-159] == enlarged[0, 0]).all(axis=-1))
    if np.array_equal(canvas[y : y + 160, x : x + 160], enlarged)
  ]
  assert len(found) == 4
  assert len({y for y, _ in found}) == 1
  assert found[0][0] > 160  # below the first image


@pytest.mark.parametrize(
  ('channels', 'shown'), [(None, [0, 1, 2]), ((5, 2, 1), [4, 1, 0]), ((4,), [3])]
)
def test_chosen_channels_of_many_are_stretched_alike_before_and_after(channels, shown):
  ramp = np.arange(2 * 16 * 32)
  images = np.stack([np.roll(ramp, 100 * c) for c in range(5)], axis=-1).astype(np.uint16)
  images = images.reshape(2, 16, 32, 5)  # a small part of the range of 16 bits
  statistics = {'mean': (0.1,) * 5, 'std': (0.2,) * 5}
  perfect, mask = np.asarray(normalize(images, **statistics)), np.array([[1, 0], [0, 1]])
  result = reconstruction.assemble(
    images, perfect, mask, **statistics, norm_pix=False, channels=channels
  )
  assert result.original.shape == (2, 16, 32, len(shown))
  np.testing.assert_array_equal(result.pasted, result.original)
  for i, channel in enumerate(shown):
    # From the darkest to the brightest pixel of that channel, and of no other.
    found = result.original[..., i].ravel()[np.argsort(images[..., channel], axis=None)].astype(int)
    assert (np.diff(found) >= 0).all()
    assert [(found == level).mean().round(2) for level in (0, 255)] == [0.02, 0.02]


def test_one_channel_is_drawn_grey():
  result = reconstruction.Reconstruction(
    *[np.full((1, 32, 32, 1), level, np.uint8) for level in (10, 60, 110, 160)],
    mask_ratio=0.5, norm_pix=False,
  )  # fmt: skip
  canvas = np.asarray(reconstruction.draw(result))
  for level in (10, 60, 110, 160):
    assert (canvas == level).all(axis=-1).sum() >= 160 * 160


@pytest.mark.parametrize('norm_pix', [True, False])
@pytest.mark.parametrize('title', ['', 'x' * 200])
def test_labels(monkeypatch, norm_pix, title):
  drawn = []
  original = ImageDraw.ImageDraw.text

  def text(self, xy, text, fill=None, font=None):
    assert xy[0] + font.getlength(text) <= self.im.size[0]
    assert xy[1] + font.size <= self.im.size[1]
    drawn.append((text, xy))
    return original(self, xy, text, fill, font)

  monkeypatch.setattr(ImageDraw.ImageDraw, 'text', text)
  reconstruction.draw(_plain_result(16, 16, norm_pix=norm_pix)[0], title=title)
  said = [text for text, _ in drawn if text]
  heads = ['original', 'masked (75 %)', 'reconstruction', 'with visible units']
  assert [text for text in said if text in heads] == heads
  assert any(NOTE in text for text in said) == norm_pix
  assert (title in said) == bool(title)
