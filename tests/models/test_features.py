"""Dense features: against the official code, and what the golden files do not show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.models import units
from tests.helpers import (
  TINY,
  TINY_MAE,
  abstract_model,
  assert_close,
  golden_params,
  load_golden,
  random_images,
  random_model,
)


@functools.partial(jax.jit, static_argnames=('levels', 'window_size', 'global_blocks'))
def _features(model, images, levels, **options):
  return model.features(images, levels, **options)


# As in test_golden: the same on every processor in float64, and near it in float32.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('dtype', 'scan', 'tolerance'),
  [('float64', False, 1e-5), ('float64', True, 1e-5), ('float32', False, 5e-5)],
)
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_features_are_those_of_the_official_code(task, dtype, scan, tolerance):
  config, arrays = load_golden(f'{task}_backbone.npz')
  keys = ('embed_dim', 'depths', 'num_heads', 'stem_mlp_ratio', 'mlp_ratio', 'rpe')
  graphdef, abstract = abstract_model(
    'backbone_hivit_tiny',
    image_size=config['img_size'],
    bias_image_size=config.get('task_img_size'),
    window_size=config.get('window_size'),
    global_blocks=config.get('global_indices', ()),
    level_norms=task == 'detection',
    scan=scan,
    dtype=dtype,
    **{key: config[key] for key in keys},
  )
  unused = {'relative_position_index'} if config['rpe'] else set()
  params = golden_params(abstract, arrays, unused)
  images = arrays['image_nchw'].transpose(0, 2, 3, 1).astype(dtype)
  with jax.enable_x64(dtype == 'float64'):
    params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
    maps = jax.jit(lambda params: nnx.merge(graphdef, params)(images))(params)
  for i, feature in enumerate(maps):
    assert feature.dtype == dtype
    expected = arrays[f'feature_{i}'].transpose(0, 2, 3, 1)
    assert_close(feature, expected, name=f'feature_{i}', relative=tolerance)


@pytest.mark.parametrize(
  ('name', 'options'), [('hivit_tiny', TINY), ('mae_hivit_tiny', TINY_MAE)], ids=['hivit', 'mae']
)
def test_every_model_gives_the_levels_that_feature_info_tells_at_any_size(name, options):
  graphdef, params = random_model(name, **options)
  model = nnx.merge(graphdef, params)
  images = random_images(2, 80, 48, 3)
  levels = (4, 1, 3)
  maps = _features(model, images, levels)
  for level, feature in zip(levels, maps, strict=True):
    info = model.feature_info[level - 1]
    assert info.level == level
    assert feature.shape == (2, 80 // info.stride, 48 // info.stride, info.channels)
  assert [info.stride for info in model.feature_info] == [4, 8, 16, 32]


def test_at_the_models_own_size_level_3_is_what_forward_features_gives():
  graphdef, params = random_model('hivit_tiny', **TINY)
  model = nnx.merge(graphdef, params)
  images = random_images(2, 64, 64, 3)
  (feature,) = _features(model, images, (3,))
  tokens = jax.jit(lambda model, images: model.forward_features(images))(model, images)
  assert_close(feature.reshape(2, 16, -1), tokens, relative=1e-6)


def test_a_window_as_large_as_the_image_is_global_attention():
  graphdef, params = random_model('hivit_tiny', **TINY, rpe=False)
  model = nnx.merge(graphdef, params)
  images = random_images(1, 64, 64, 3)
  everywhere, windowed = (_features(model, images, (3,), window_size=w)[0] for w in (None, 4))
  assert_close(windowed, everywhere)


def test_nothing_crosses_a_window_until_a_global_block():
  graphdef, params = random_model('hivit_tiny', **TINY, rpe=False)
  model = nnx.merge(graphdef, params)
  images = random_images(1, 64, 64, 3)
  changed = images.copy()
  changed[:, :32, :32] += 1.0  # the first of four windows
  for global_blocks, crosses in [((), False), ((1,), True)]:
    a, b = (
      _features(model, x, (3,), window_size=2, global_blocks=global_blocks)[0]
      for x in (images, changed)
    )
    differs = np.abs(a - b).max(axis=(0, 3)) > 1e-6
    assert differs[:2, :2].all()
    assert differs[2:].all() == differs[:, 2:].all() == crosses


def test_drop_path_drops_whole_examples_with_windows_too():
  graphdef, params = random_model('hivit_tiny', **TINY, rpe=False, drop_path_rate=0.5)
  model = nnx.merge(graphdef, params)
  images = random_images(2, 64, 96, 3)
  noise = jnp.stack([jnp.ones((6, 2)), jnp.zeros((6, 2))]).at[0].set(0.999)
  kept, mixed = (
    _features(model, images, (3,), window_size=2, drop_path_noise=x)[0]
    for x in (jnp.zeros((2, 6, 2)), noise)
  )
  assert_close(mixed[1], kept[1])
  assert np.abs(mixed[0] - kept[0]).max() > 0.1


@pytest.mark.parametrize(
  ('options', 'size', 'arguments', 'message'),
  [
    ({}, 60, {}, 'multiples of 16'),
    ({}, 64, {'levels': (0, 1)}, 'levels must be some of 1, 2, 3, 4'),
    ({}, 16, {}, 'leave out level 4'),
    ({}, 64, {'window_size': 2}, 'rpe=False'),
    ({'rpe': False}, 64, {'window_size': 2, 'global_blocks': (2,)}, r'0\.\.1'),
  ],
)
def test_mistakes_are_named(options, size, arguments, message):
  model = hivit_jax.create_model('hivit_tiny', **TINY, **options)
  with pytest.raises(UserError, match=message):
    model.features(random_images(1, size, size, 3), **arguments)


def test_images_of_other_channels_are_refused():
  model = hivit_jax.create_model('hivit_tiny', **TINY)
  with pytest.raises(UserError, match=r'images must be \(B, H, W, 3\), got \(1, 64, 64, 1\)'):
    model.features(random_images(1, 64, 64, 1))


def test_of_equal_places_the_first_gets_the_gradient_of_the_pooled_level():
  """As in PyTorch. And it is finite where XLA computes what is pooled anew, rounded otherwise."""
  graphdef, params = random_model('hivit_tiny', **TINY, drop_path_rate=0.5)
  images, noise = random_images(2, 64, 64, 3), np.full((2, 6, 2), 0.5, np.float32)

  def loss(params):
    model = nnx.merge(graphdef, params)
    return sum(jnp.square(x).sum() for x in model.features(images, drop_path_noise=noise))

  grads = jax.jit(jax.grad(loss))(params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  x = jnp.zeros((1, 3, 5, 1)).at[0, 1, 1].set(1).at[0, 1, 2].set(1)
  pooled, pull = jax.vjp(units.max_pool, x)
  np.testing.assert_array_equal(pooled[0, ..., 0], [[1, 1]])
  (gradient,) = pull(jnp.ones_like(pooled))
  np.testing.assert_array_equal(np.argwhere(gradient[0, ..., 0]), [[1, 1], [1, 2]])
  (gradient,) = jax.vjp(units.max_pool, jnp.zeros((1, 2, 2, 1)))[1](jnp.ones((1, 1, 1, 1)))
  np.testing.assert_array_equal(gradient[0, ..., 0], [[1, 0], [0, 0]])
