"""The masked autoencoder: what is masked, what the loss sees, and every option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.interop import torch_names
from hivit_jax.models.masking import kept_units, random_masking, unit_moments
from hivit_jax.models.units import join_units, split_units
from tests.helpers import (
  TINY_MAE,
  abstract_model,
  assert_close,
  assert_trees_close,
  random_images,
  random_model,
)

NAME = 'mae_hivit_tiny'


def _call(graphdef, **options):
  return lambda params, images, **more: nnx.merge(graphdef, params)(images, **options, **more)


@pytest.fixture(scope='module')
def mae():
  return random_model(NAME, **TINY_MAE)


# --- choosing units


def test_the_smallest_noise_is_kept():
  noise = np.random.default_rng(0).random((3, 16), np.float32)
  ids_keep, ids_restore, mask = map(np.asarray, random_masking(noise, 5))
  for row in range(3):
    order = sorted(range(16), key=lambda n: noise[row, n])
    assert list(ids_keep[row]) == order[:5]
    assert [order[place] for place in ids_restore[row]] == list(range(16))
    assert set(np.flatnonzero(mask[row] == 0)) == set(order[:5])
  assert set(np.unique(mask)) == {0, 1}


@pytest.mark.parametrize(
  ('units', 'ratio', 'kept'), [(196, 0.75, 49), (196, 0.6, 78), (16, 0.5, 8), (8, 0.85, 1)]
)
def test_kept_units(units, ratio, kept):
  assert kept_units(units, ratio) == kept


@pytest.mark.parametrize('ratio', [0.0, 1.0, -0.5, 1.5, float('nan')])
def test_mask_ratio_outside_of_0_and_1(ratio):
  with pytest.raises(UserError, match=f'mask_ratio .* between 0 and 1, got {ratio}'):
    abstract_model(NAME, **TINY_MAE, mask_ratio=ratio)


@pytest.mark.parametrize(('ratio', 'keep'), [(0.99, 0), (1e-17, 16)])
def test_mask_ratio_that_keeps_all_or_nothing(ratio, keep):
  with pytest.raises(UserError, match=f'mask_ratio {ratio} keeps {keep} of 16 units'):
    abstract_model(NAME, **TINY_MAE, mask_ratio=ratio)


def test_every_way_to_choose_the_same_units(mae):
  graphdef, params = mae
  images = random_images(2, 64, 64, 3)
  key = jax.random.key(0)
  noise = nnx.merge(graphdef, params).masking_noise(key, 2)
  assert noise.shape == (2, 16)
  by_key = jax.jit(_call(graphdef))(params, images, rng=key)
  by_noise = jax.jit(_call(graphdef))(params, images, noise=noise)
  jax.tree.map(np.testing.assert_array_equal, by_key, by_noise)

  # The mask says which units, not in which order the encoder gets them.
  by_mask = jax.jit(_call(graphdef, mask=np.asarray(by_key.mask)))(params, images)
  assert_close(by_mask.loss, by_noise.loss)
  assert_close(by_mask.pred, by_noise.pred)
  np.testing.assert_array_equal(by_mask.mask, by_noise.mask)
  for row in range(2):
    kept = np.flatnonzero(np.asarray(by_noise.mask)[row] == 0)
    assert list(np.asarray(by_mask.ids_keep)[row]) == list(kept)
    assert sorted(np.asarray(by_noise.ids_keep)[row]) == list(kept)


def test_ratio_and_mask_of_a_call_go_before_the_models(mae):
  graphdef, params = mae
  images = random_images(2, 64, 64, 3)
  noise = np.random.default_rng(0).random((2, 16), np.float32)
  mask = (noise > np.sort(noise, axis=1)[:, 5:6]).astype(bool)  # keeps six
  half = jax.jit(_call(graphdef, noise=noise, mask_ratio=0.5))(params, images)
  six = jax.jit(_call(graphdef, mask=mask))(params, images)
  assert (half.mask.sum(axis=1) == 8).all()
  np.testing.assert_array_equal(six.mask, mask)
  assert six.ids_keep.shape == (2, 6)


@pytest.mark.parametrize(
  ('mask', 'message'),
  [
    (np.ones((2, 15)), r'must be \(B, 16\).*\(2, 15\)'),
    (np.ones(16), r'must be \(B, 16\).*\(16,\)'),
    (np.full((2, 16), 0.5), r'1 \(removed\) or 0 \(kept\).*0\.5'),
    (np.full((2, 16), np.nan), r'1 \(removed\) or 0 \(kept\).*nan'),
    (np.ones((2, 16)), r'1 to 15, in every row, keeps 0'),
    (np.zeros((2, 16)), r'1 to 15, in every row, keeps 16'),
    (np.tri(2, 16), r'same number of units.*keeps 14 or 15'),
    (np.eye(3, 16), r'must be \(2, 16\).*\(3, 16\)'),
  ],
)
def test_masks_that_cannot_be_used(mae, mask, message):
  model, images = nnx.merge(*mae), jnp.zeros((2, 64, 64, 3))
  with pytest.raises(UserError, match=message) as caught:
    model(images, mask=mask)
  assert '\n' not in str(caught.value)


def test_ways_to_choose_units_that_contradict(mae):
  model, images = nnx.merge(*mae), jnp.zeros((2, 64, 64, 3))
  noise, mask = np.zeros((2, 16), np.float32), np.eye(2, 16)
  for both in ({}, {'noise': noise, 'mask': mask}, {'noise': noise, 'rng': jax.random.key(0)}):
    with pytest.raises(ValueError, match='one of noise=, rng= and mask='):
      model(images, **both)
  with pytest.raises(ValueError, match='mask_ratio= or mask='):
    model(images, mask=mask, mask_ratio=0.5)
  with pytest.raises(UserError, match=r'must be \(2, 16\).*got \(2, 15\)'):
    model(images, noise=noise[:, :15])
  with pytest.raises(ValueError, match='concrete'):
    jax.eval_shape(lambda mask: model(images, mask=mask), mask)


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((2, 64, 64, 1), r'\(B, H, W, 3\).*\(2, 64, 64, 1\)'),
    ((2, 32, 64, 3), r'takes images of 64x64 pixels.*32x64'),
    ((2, 64, 72, 3), r'takes images of 64x64 pixels.*64x72'),
  ],
)
def test_images_that_do_not_fit(mae, shape, message):
  with pytest.raises(UserError, match=message):
    nnx.merge(*mae)(jnp.zeros(shape), rng=jax.random.key(0))


# --- what is seen


def test_predictions_come_from_visible_pixels_only(mae):
  graphdef, params = mae
  images = random_images(2, 64, 64, 3)
  noise = np.random.default_rng(0).random((2, 16), np.float32)
  removed = np.asarray(random_masking(noise, 4)[2], bool)
  weights = random_images(2, 16, 768, seed=1)

  def objective(images):
    out = nnx.merge(graphdef, params)(images, noise=noise)
    return (weights * out.pred).sum(), out

  run = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (_, out), gradient = run(images)
  gradient = np.asarray(split_units(gradient))
  assert (gradient[removed] == 0).all()
  assert (gradient[~removed] != 0).all()

  units = np.array(split_units(images))
  units[removed] = np.nan
  (_, poisoned), _ = run(np.asarray(join_units(units, (4, 4))))
  np.testing.assert_array_equal(out.pred, poisoned.pred)
  assert np.isnan(poisoned.loss)


@pytest.mark.parametrize('norm_pix_loss', [True, False])
def test_loss_is_the_mean_over_removed_pixels(norm_pix_loss):
  graphdef, params = random_model(
    NAME, **TINY_MAE | {'image_size': (32, 64)}, norm_pix_loss=norm_pix_loss
  )
  images = 0.5 + random_images(2, 32, 64, 3)
  noise = np.random.default_rng(0).random((2, 8), np.float32)
  out = jax.jit(_call(graphdef, noise=noise, mask_ratio=0.5))(params, images)
  errors = []
  for b in range(2):
    for n in range(8):
      row, column = divmod(n, 4)
      unit = images[b, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].astype(np.float64)
      if norm_pix_loss:
        unit = (unit - unit.mean()) / np.sqrt(unit.var(ddof=1) + 1e-6)
      if out.mask[b, n]:
        errors.append(np.square(out.pred[b, n] - unit.ravel()).mean())
  assert len(errors) == 8
  assert_close(out.loss, np.mean(errors))
  assert out.loss.dtype == out.pred.dtype == out.mask.dtype == jnp.float32


def test_a_flat_unit_has_a_finite_target():
  graphdef, params = random_model(NAME, **TINY_MAE)
  target = nnx.merge(graphdef, params).target(np.full((1, 64, 64, 3), 0.7, np.float32))
  assert np.abs(target).max() < 1e-2
  mean, variance = unit_moments(np.full((1, 2, 768), 0.7, np.float32))
  np.testing.assert_allclose(mean, 0.7, rtol=1e-5)
  assert variance.max() < 1e-9


# --- options


def test_decoder_gets_all_stages_or_the_last():
  graphdef, params = random_model(NAME, **TINY_MAE)
  single, fewer = abstract_model(NAME, **TINY_MAE, hifeat=False)
  assert params['decoder_embed']['kernel'].shape == (7 * 32, 16)
  assert fewer['decoder_embed']['kernel'].shape == (32, 16)
  flat = {'/'.join(path) for path in torch_names.flatten(params)}
  flat_fewer = {'/'.join(path) for path in torch_names.flatten(fewer)}
  assert flat - flat_fewer == {'norm/scale', 'norm/bias'}
  assert flat_fewer < flat

  # The concatenation is normalised as a whole: stage 1 (4C), stage 2 (2C), stage 3 (C).
  images = random_images(1, 64, 64, 3)
  ids = np.array([[3, 9]])
  params['norm'] = {'scale': np.ones(224, np.float32), 'bias': np.zeros(224, np.float32)}
  encoder = {key: value for key, value in params.items() if key in fewer and key != 'decoder_embed'}
  encoder['decoder_embed'] = jax.tree.map(lambda x: np.zeros(x.shape), fewer['decoder_embed'])

  def latents(params, encoder, images):
    model, other = nnx.merge(graphdef, params), nnx.merge(single, encoder)
    return model.latent(images, ids=ids), other.latent(images, ids=ids), model.stages(images)

  every, last, stages = jax.jit(latents)(params, encoder, images)
  assert every.shape == (1, 2, 224)
  assert last.shape == (1, 2, 32)
  # Undo the LayerNorm: stage 3's part is `last` up to one factor and one offset per unit.
  for unit in range(2):
    correlation = np.corrcoef(every[0, unit, 192:], last[0, unit])[0, 1]
    assert correlation > 1 - 1e-6
    first = np.asarray(stages[0])[0, ids[0, unit]]  # (16, 8) in merge order
    correlation = np.corrcoef(np.sort(every[0, unit, :128]), np.sort(first.ravel()))[0, 1]
    assert correlation > 1 - 1e-6


@pytest.mark.parametrize('channels', [1, 4])
def test_other_channel_counts(channels):
  graphdef, params = random_model(NAME, **TINY_MAE | {'image_size': 32}, channels=channels)
  images = random_images(2, 32, 32, channels)
  noise = np.random.default_rng(0).random((2, 4), np.float32)
  out = jax.jit(_call(graphdef, noise=noise))(params, images)
  assert out.pred.shape == (2, 4, 256 * channels)
  # In the space of the target: the same pixels in the same order.
  model = nnx.merge(graphdef, params)
  model.norm_pix_loss = False
  expected = np.asarray(split_units(images)).reshape(2, 4, -1)
  np.testing.assert_array_equal(model.target(images), expected)
  assert np.isfinite(out.loss)


@pytest.mark.slow
def test_scan_changes_nothing():
  options = TINY_MAE | {'rpe': True, 'drop_path_rate': 0.5, 'mask_ratio': 0.5}
  _, params = random_model(NAME, **options)
  images = random_images(2, 64, 64, 3)
  rng = np.random.default_rng(0)
  noise, drop = rng.random((2, 16), np.float32), rng.random((2, 6, 2), np.float32)

  def training(**form):
    graphdef, _ = abstract_model(NAME, **options, **form)

    def loss(params):
      out = nnx.merge(graphdef, params)(images, noise=noise, drop_path_noise=drop)
      return out.loss, out

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  grads, out = training(scan=True)
  expected_grads, expected_out = training()
  assert not grads.pop('decoder_pos_embed').any()  # it is fixed
  assert not expected_grads.pop('decoder_pos_embed').any()
  assert_trees_close(out, expected_out)
  assert_trees_close(grads, expected_grads)


def test_drop_path_is_off_unless_it_gets_numbers():
  options = TINY_MAE | {'image_size': 32}
  graphdef, params = random_model(NAME, **options, drop_path_rate=0.9)
  plain, _ = abstract_model(NAME, **options)
  images = random_images(2, 32, 32, 3)
  noise = np.random.default_rng(0).random((2, 4), np.float32)
  evaluated = jax.jit(_call(graphdef, noise=noise))(params, images)
  jax.tree.map(
    np.testing.assert_array_equal, evaluated, jax.jit(_call(plain, noise=noise))(params, images)
  )
  drop = np.ones((2, 6, 2), np.float32) - 1e-3
  trained = jax.jit(_call(graphdef, noise=noise, drop_path_noise=drop))(params, images)
  assert abs(trained.loss - evaluated.loss) > 1e-3


def test_pooled_features_are_the_mean_token_of_the_whole_image(mae):
  graphdef, params = mae
  images = random_images(2, 64, 64, 3)

  def function(params):
    model = nnx.merge(graphdef, params)
    return model.pooled(images), model.forward_features(images)

  pooled, tokens = jax.jit(function)(params)
  assert pooled.shape == (2, 32)
  assert_close(pooled, np.asarray(tokens).mean(axis=1))
