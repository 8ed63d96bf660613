"""Weights for RGB images in models for other channels: exact where channels are copies."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest

from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.interop import channels, exporter, importer
from hivit_jax.interop.files import StateDict
from tests.helpers import TINY_MAE, assert_close
from tests.interop_files import golden_state

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((8, 3, 4, 4), np.float32)
PATCHES = RNG.standard_normal((5, 3, 4, 4), np.float32)
GREY = PATCHES[:, :1].repeat(3, axis=1)
CASES = [  # (channels, way, patches, which of their channels each is a copy of; None: of none)
  (13, 'repeat', PATCHES, [i % 3 for i in range(13)]),
  (6, 'repeat', PATCHES, [0, 1, 2, 0, 1, 2]),
  (1, 'repeat', GREY, [0]),
  (13, 'mean', GREY, [0] * 13),
  (2, 'copy', GREY, [0, 0]),
  (13, 'copy', PATCHES, [0, 1, 2, *[None] * 10]),
]


def _adapted(name: str, value: np.ndarray, outputs: int, count: int, way: str) -> np.ndarray:
  value, how = channels.adapted(name, value, SimpleNamespace(shape=(outputs,)), count, way)
  assert how == f'from 3 channels to {count}, init_channels={way}'
  return value


def _embedded(kernel: np.ndarray, patches: np.ndarray) -> np.ndarray:
  return np.einsum('ocij,ncij->no', kernel, patches)


@pytest.mark.parametrize(('count', 'way', 'patches', 'copied'), CASES)
def test_the_encoder_sees_what_it_did_of_copied_bands(count, way, patches, copied):
  other = RNG.standard_normal((5, 4, 4), np.float32)
  bands = np.stack([other if c is None else patches[:, c] for c in copied], axis=1)
  kernel = _adapted('patch_embed.proj.weight', KERNEL, 8, count, way)
  assert kernel.shape == (8, count, 4, 4)
  assert_close(_embedded(kernel, bands), _embedded(KERNEL, patches), relative=1e-6)


@pytest.mark.parametrize('name', ['decoder_pred', 'decoder.0'])
@pytest.mark.parametrize(('count', 'way', 'patches', 'copied'), CASES)
def test_the_decoder_predicts_the_copies(name, count, way, patches, copied):
  """The three are apart by channel, last in MAE's outputs and first in SimMIM's."""
  last = name == 'decoder_pred'
  weight = RNG.standard_normal((16 * 3, 7), np.float32)
  bias = RNG.standard_normal(16 * 3, np.float32)
  latent = RNG.standard_normal(7, np.float32)

  def predicted(weight, bias, count):
    out = weight @ latent + bias
    return out.reshape(16, count) if last else out.reshape(count, 16).T

  before = predicted(weight, bias, 3)
  own = [_adapted(f'{name}.{k}', v, 16 * count, count, way)
         for k, v in (('weight', weight), ('bias', bias))]  # fmt: skip
  grey = way == 'mean' or count < 3
  for c, pixels in zip(copied, predicted(*own, count).T, strict=True):
    expected = 0 * before[:, 0] if c is None else before.mean(1) if grey else before[:, c]
    np.testing.assert_allclose(pixels, expected, rtol=1e-5, atol=1e-6)


def test_two_images_get_half_each():
  """As SUTrack starts from RGB and another modality: of two images the encoder sees the mean."""
  kernel = _adapted('patch_embed.proj.weight', KERNEL, 8, 6, 'repeat')
  pair = np.concatenate([PATCHES, GREY], axis=1)
  assert_close(_embedded(kernel, pair), _embedded(KERNEL, (PATCHES + GREY) / 2), relative=1e-6)


def test_all_of_an_autoencoder_is_loaded_and_a_round_trip_of_13_bands_is_exact():
  create = functools.partial(models.create_model, 'mae_hivit_tiny', **TINY_MAE)
  rgb = golden_state('mae_hifeat_normpix')
  loaded, report = importer.load_new(
    functools.partial(create, channels=13), StateDict(rgb, 'FILE', {}), init_channels='copy'
  )
  assert not report.new
  assert not report.dropped
  changed = {'patch_embed.proj.weight', 'decoder_pred.weight', 'decoder_pred.bias'}
  assert set(report.resized) == changed
  assert 'from 3 channels to 13, init_channels=copy' in str(report)
  state = exporter.state_dict(loaded)
  again, report = importer.load_new(
    functools.partial(create, channels=13), StateDict(state, 'FILE', {}), init_channels='mean'
  )
  assert not report.resized
  back = exporter.state_dict(again)
  assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in state.items()}
  with pytest.raises(UserError, match=r'patch_embed.proj.weight is \(\d, 13, 4, 4\) there'):
    importer.load_new(create, StateDict(state, 'FILE', {}))
