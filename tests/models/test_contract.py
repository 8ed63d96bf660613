"""What all models have in common: the contract of `encoder.Encoder`, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.mask_rcnn import MaskRCNN, SwinMaskRCNN, ViTMaskRCNN
from hivit_jax.models.upernet import Segmenter
from hivit_jax.ops.precision import widen
from tests.helpers import (
  TINY,
  TINY_MAE,
  TINY_SWIN,
  TINY_VIT,
  assert_close,
  random_images,
  random_model,
)

_DECODER = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}
FAMILIES = {
  'hivit_tiny': TINY | {'image_size': 32},
  'backbone_hivit_tiny': TINY | {'image_size': 32},
  'mae_hivit_tiny': TINY_MAE | {'image_size': 32},
  'backbone_itpn_base': TINY | {'image_size': 32, 'fpn_dim': 12, 'join_stages': True},
  'mae_itpn_base': TINY_MAE | {'image_size': 32, 'fpn_dim': 12},
  'fast_itpn_tiny': TINY | {'image_size': 32},
  'backbone_fast_itpn_tiny': TINY | {'image_size': 32},
  'vit_base': TINY_VIT | {'depth': 2},
  'mae_vit_base': TINY_VIT | _DECODER | {'depth': 2},
  'swin_tiny': TINY_SWIN,
  'simmim_swin_tiny': TINY_SWIN,
}
CHANNELS = {'backbone_itpn_base': TINY['embed_dim']}  # whose levels are not stages
CLASS_TOKENS = {'vit_base': 1, 'mae_vit_base': 1}


@pytest.fixture(scope='module', params=FAMILIES)
def family(request):
  """A model whose blocks can be dropped."""
  graphdef, params = random_model(request.param, **FAMILIES[request.param], drop_path_rate=0.5)
  return request.param, nnx.merge(graphdef, params)


def test_no_encoder_is_left_out():
  encoders = {cls for cls, _ in models.MODELS.values()} - {
    MaskRCNN,
    SwinMaskRCNN,
    ViTMaskRCNN,
    Segmenter,
  }
  assert {models.MODELS[name][0] for name in FAMILIES} == encoders


def test_features_their_mean_and_their_channels(family):
  """And drop path is off without numbers, and the same in all of them with numbers."""
  name, model = family
  images = jnp.asarray(random_images(2, 32, 32, 3))
  noise = jnp.full_like(model.drop_path_noise(jax.random.key(0), 2), 0.999)

  @jax.jit
  def run(images, noise):
    return (
      model.forward_features(images),
      model.pooled(images),
      model.forward_features(images, drop_path_noise=noise),
      model.pooled(images, drop_path_noise=noise),
      model.stages(images),
      model.unit_tokens(images),
    )

  features, pooled, dropped, dropped_pooled, stages, units = run(images, noise)
  channels = CHANNELS.get(name, model.feature_info[-1].channels)
  assert features.shape[-1] == channels
  first = CLASS_TOKENS.get(name, 0)
  for tokens, mean in ((features, pooled), (dropped, dropped_pooled)):
    assert mean.shape == (2, channels)
    assert_close(mean, np.asarray(tokens)[:, first:].reshape(2, -1, channels).mean(axis=1))
  np.testing.assert_array_equal(stages[-1], features[:, first:])
  np.testing.assert_array_equal(units[-1].reshape(stages[-1].shape), stages[-1])
  for whole, cut in zip(stages, units, strict=True):
    assert cut.shape[:3] == units[-1].shape[:3]
    side = math.isqrt(cut.shape[3])
    of_first = whole[:, :side, :side] if 'swin' in name else whole[:, 0]  # a map, or units
    np.testing.assert_array_equal(cut[:, 0, 0], of_first.reshape(cut[:, 0, 0].shape))
  assert np.abs(dropped - features).max() > 1e-2


def test_levels_have_the_channels_and_strides_of_feature_info(family):
  _, model = family
  images = jnp.zeros((1, 32, 32, 3))
  maps = jax.eval_shape(getattr(model, 'features', model.stages), images)
  assert len(maps) == len(model.feature_info)
  for x, info in zip(maps, model.feature_info, strict=True):
    cells = (32 // info.stride) ** 2
    assert (x.size, x.shape[-1]) == (cells * info.channels, info.channels)
  assert [info.level for info in model.feature_info] == list(range(1, len(maps) + 1))


def test_only_the_units_asked_for(family):
  name, model = family
  images, ids = jnp.zeros((2, 32, 32, 3)), jnp.asarray([[0, 3], [2, 1]])
  encode = lambda: model.forward_features(images, ids)  # noqa: E731
  if 'swin' in name:
    with pytest.raises(UserError, match='Swin computes all patches and takes no ids'):
      encode()
  else:
    width = CHANNELS.get(name, model.feature_info[-1].channels)
    assert jax.eval_shape(encode).shape == (2, CLASS_TOKENS.get(name, 0) + 2, width)


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (np.zeros((1, 32, 32, 3), np.uint8), 'normalised floating point numbers, got uint8: divide'),
    (np.zeros((1, 32, 32, 1), np.float32), r'images must be \(B, H, W, 3\), got \(1, 32, 32, 1\)'),
    (np.zeros((32, 32, 3), np.float32), r'images must be \(B, H, W, 3\), got \(32, 32, 3\)'),
    (np.zeros((1, 32, 64, 3), np.float32), 'takes images of 32x32 pixels, got 32x64'),
  ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(family, images, message):
  _, model = family
  with pytest.raises(UserError, match=message) as caught:
    model.pooled(images)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['hivit_tiny', 'fast_itpn_tiny', 'vit_base', 'swin_tiny'])
def test_without_classes_a_classifier_gives_the_features_before_the_head(name):
  model = hivit_jax.create_model(name, **FAMILIES[name], num_classes=0, dtype='bfloat16')
  assert isinstance(model, Classifier)
  images = jnp.asarray(random_images(2, 32, 32, 3))

  @jax.jit
  def run(images):
    pooled = model.pooled(images)
    return model(images), pooled if model.fc_norm is None else model.fc_norm(pooled)

  out, features = run(images)
  assert out.dtype == jnp.float32
  np.testing.assert_array_equal(out, widen(features))
