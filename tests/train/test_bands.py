"""Training on images of 13 bands of 16 bits, from files to gradients."""

import jax
import numpy as np
import pytest
import tifffile
from flax import nnx

from configs import detect_hivit_b, finetune_hivit_b, mae_hivit_t
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from hivit_jax.models.units import split_units
from hivit_jax.tasks.images import normalize
from hivit_jax.tools import statistics
from hivit_jax.train import assemble, hints, synthetic, validate
from hivit_jax.train.setup import set_up

BANDS = {
  'channels': 13,
  'data.dtype': 'uint16',
  'data.mean': (0.05,) * 13,
  'data.std': (0.02,) * 13,
}


def _config(module=mae_hivit_t, **own):
  config = module.get_config('debug')
  config.update_from_flattened_dict(BANDS | own)
  return config


@pytest.fixture
def fields(tmp_path):
  """Reflectances as satellites deliver them: a small part of the range of 16 bits."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 4), ('val', 2)):
    for i in range(count):
      folder = tmp_path / split / 'ab'[i % 2]
      folder.mkdir(parents=True, exist_ok=True)
      bands = rng.integers(1000 * np.arange(1, 14), 1000 * np.arange(1, 14) + 1500, (40, 50, 13))
      bands = bands.astype(np.uint16)
      if i % 2:
        np.save(folder / f'{i}.npy', bands)
      else:
        planes = np.moveaxis(bands, -1, 0)
        tifffile.imwrite(folder / f'{i}.tif', planes, photometric='minisblack')
  return tmp_path


def gradients(setup, batch):
  """Of the task's loss, in all parameters."""
  graphdef, params = nnx.split(assemble.model_creator(setup.config)())

  @jax.jit
  def gradient(params, batch):
    def loss(params):
      model = nnx.merge(graphdef, params)
      return setup.task.loss(model, setup.task.prepare(model, batch, jax.random.key(0)))[0]

    return jax.grad(loss)(params)

  return gradient(params, batch)


def first_batch(folder, module=mae_hivit_t, **own):
  """Of a run on a folder, with the statistics measured there: its setup, and a batch."""
  found = statistics.measure(open_source(f'folder:{folder}', 'train'), 0)
  config = _config(module, **{
    'data.name': f'folder:{folder}', 'data.train_split': 'train', 'data.eval_split': 'val',
    'data.mean': tuple(map(float, found.mean)), 'data.std': tuple(map(float, found.std)),
    'batch_size': 4, 'knn.every_epochs': 0.0, 'model.embed_dim': 16, 'model.depths': (0, 0, 1),
  } | own)  # fmt: skip
  setup = set_up(validate.checked(config))
  with setup.train_batches(0, 1) as batches:
    return setup, next(batches)


def test_from_a_folder_to_gradients_of_every_band(fields):
  setup, batch = first_batch(fields)
  images = batch['image']
  assert (images.shape, images.dtype) == ((4, 32, 32, 13), np.uint16)
  planned = synthetic.abstract_batch(setup.config, setup.mesh)['image']
  assert (planned.shape, planned.dtype) == (images.shape, images.dtype)
  normalised = np.asarray(normalize(images, setup.task.mean, setup.task.std))
  np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=0.2)
  np.testing.assert_allclose(normalised.std((0, 1, 2)), 0.8, atol=0.2)
  found = gradients(setup, batch)
  kernel = np.asarray(found['patch_embed']['proj']['kernel'][...])
  assert kernel.shape[2] == 13
  assert (np.abs(kernel).max(axis=(0, 1, 3)) > 0).all()
  predicted = np.asarray(found['decoder_pred']['kernel'][...])
  assert (np.abs(predicted.reshape(-1, 256, 13)).max(axis=(0, 1)) > 0).all()
  assert split_units(images).shape[-1] == 13


def test_bands_are_erased_and_mixed(fields):
  mixed = {'augment.rand_augment': None, 'augment.erase': 1.0, 'augment.mixup': 0.8}
  setup, batch = first_batch(fields, finetune_hivit_b, **mixed | {'augment.cutmix': 1.0})
  assert (batch['image'].shape[-1], batch['image'].dtype) == (13, np.uint16)
  kernel = np.asarray(gradients(setup, batch)['patch_embed']['proj']['kernel'][...])
  assert np.isfinite(kernel).all()
  assert (np.abs(kernel).max(axis=(0, 1, 3)) > 0).all()


def test_one_band_of_floats_reaches_task_and_gradients_in_its_own_units(tmp_path):
  """Temperatures in kelvin: bytes would end at 255."""
  rng = np.random.default_rng(0)
  for split in ('train', 'val'):
    (tmp_path / split).mkdir()
    for i in range(4):
      kelvin = rng.normal(300, 5, (40, 50)).astype(np.float32)
      np.save(tmp_path / split / f'{i}.npy', kelvin)
  setup, batch = first_batch(tmp_path, **{'channels': 1, 'data.dtype': 'float32'})
  images = batch['image']
  assert (images.shape, images.dtype) == ((4, 32, 32, 1), np.float32)
  assert 295 < np.asarray(images).mean() < 305
  normalised = np.asarray(normalize(images, setup.task.mean, setup.task.std))
  assert abs(normalised.mean()) < 0.2
  assert 0.5 < normalised.std() < 1.1
  kernel = np.asarray(gradients(setup, batch)['patch_embed']['proj']['kernel'][...])
  assert kernel.shape[2] == 1
  assert np.abs(kernel).max() > 0


def test_settings_that_do_not_go_with_bands_are_named_with_the_way_out():
  for module, setting, message in (
    (mae_hivit_t, {'data.mean': (0.5,) * 3}, 'data.mean: 3 numbers .* -m hivit_jax.tools.statis'),
    (mae_hivit_t, {'data.mean': (300.0,) * 13}, 'uint16 is scaled to .0, 1., and so are its stat'),
    (mae_hivit_t, {'pictures.channels': (14, 2, 1)}, r'there are config.channels=13, counted'),
    (mae_hivit_t, {'pictures.channels': (0,)}, 'expected one channel, or three, counted from 1'),
    (mae_hivit_t, {'data.dtype': 'int16'}, 'data.dtype=int16: expected one of uint8, uint16, fl'),
    (mae_hivit_t, {'init_channels': 'half'}, 'expected one of repeat, mean, copy'),
    (mae_hivit_t, {'augment.color_jitter': 0.4}, 'uint16: --config.augment.color_jitter=0$'),
    (finetune_hivit_b, {}, 'augment.rand_augment=rand.*changes colours.*rand_augment=None'),
    (detect_hivit_b, {'channels': 3, 'data.mean': (0.5,) * 3, 'data.std': (1.0,) * 3},
     'config.task=detect takes bytes of 3 channels or 1, not config.channels=3 and config.data.d'),
  ):  # fmt: skip
    with pytest.raises(UserError, match=message):
      validate.check(_config(module, **setting))
  validate.check(_config(**{'data.dtype': 'float32', 'data.mean': (-300.0,) * 13}))
  validate.check(_config(finetune_hivit_b, **{'augment.rand_augment': None}))
  unread = hints.without_effect(_config(init_channels='mean'))
  assert unread == ['init_channels=mean (init=None)']
