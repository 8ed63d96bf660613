"""Segmentation as a task: what counts, what is drawn, what decays."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import segment_hivit_b
from hivit_jax.errors import UserError
from hivit_jax.interop import torch_names
from hivit_jax.tasks.segment import SegmentTask
from hivit_jax.train import optim, rules
from tests.helpers import GOLDEN, abstract_model, assert_close, random_model

MODEL = {
  'image_size': 32, 'position_image_size': 32, 'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2,
  'num_classes': 3, 'head_channels': 8, 'auxiliary_channels': 4, 'dropout_rate': 0.0,
}  # fmt: skip
BATCH, SIDE = 4, 32


def _task(**options):
  statistics = {'mean': (0.5,) * 3, 'std': (0.25,) * 3}
  return SegmentTask(**statistics, image_size=(SIDE, SIDE), num_classes=3, **options)


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, (BATCH, SIDE, SIDE)).astype(np.uint8)
  labels[:, :5] = 255
  return {
    'image': rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8),
    'label_map': labels,
    'extent': np.full((BATCH, 2), SIDE, np.int32),
  }


@pytest.fixture(scope='module')
def model():
  return random_model('segment_hivit_tiny', **MODEL)


def _loss(model, task, batch, seed=0):
  graphdef, params = model
  prepared = task.prepare(nnx.merge(graphdef, params), batch, jax.random.key(seed))
  return jax.device_get(_metrics(graphdef, task, params, prepared))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _metrics(graphdef, task, params, batch):
  value, metrics = task.loss(nnx.merge(graphdef, params), batch)
  return {'loss': value, **metrics}


def test_the_mean_is_over_all_pixels_or_over_labelled_ones(model):
  batch = _batch()
  every, labelled = (
    _loss(model, _task(mean_over=over, photometric=False), batch) for over in ('all', 'labelled')
  )
  share = (batch['label_map'] != 255).mean()
  assert share == pytest.approx(27 / 32)
  assert every['loss'] == pytest.approx(labelled['loss'] * share, rel=1e-6)
  assert every['loss'] == pytest.approx(every['main_loss'] + 0.4 * every['auxiliary_loss'])
  assert every['pixel_accuracy'] == labelled['pixel_accuracy']


@pytest.mark.slow
def test_class_weights_and_ignored_pixels(model):
  """Half of a class's weight is half of its pixels; an ignored label may be anything."""
  batch = _batch()
  plain = _loss(model, _task(), batch)['main_loss']
  only = [
    _loss(model, _task(class_weights=tuple(np.eye(3)[i].tolist())), batch)['main_loss']
    for i in range(3)
  ]
  assert sum(only) == pytest.approx(plain, rel=1e-5)
  assert min(only) > 0.1
  other = _batch() | {'label_map': np.where(batch['label_map'] == 255, 200, batch['label_map'])}
  assert _loss(model, _task(ignore_index=200), other)['main_loss'] == pytest.approx(plain)


def test_padding_is_the_mean_colour_whatever_is_there(model):
  batch = _batch()
  batch['extent'] = np.array([[20, 32], [32, 32], [32, 9], [32, 32]], np.int32)
  found = _loss(model, _task(photometric=False), batch)
  noise = {**batch, 'image': batch['image'].copy()}
  noise['image'][0, 20:], noise['image'][2, :, 9:] = 3, 250
  assert found == _loss(model, _task(photometric=False), noise)
  noise['image'][0, 19] = 3
  assert found != _loss(model, _task(photometric=False), noise)


def test_random_numbers_are_of_the_whole_batch(model):
  graphdef, params = random_model(
    'segment_hivit_tiny', **MODEL | {'dropout_rate': 0.5, 'drop_path_rate': 0.2}
  )
  prepare = jax.jit(
    lambda key: _task(photometric=True).prepare(nnx.merge(graphdef, params), _batch(), key)
  )
  one, again, other = (prepare(jax.random.key(seed)) for seed in (0, 0, 1))
  assert one['dropout_noise'].shape == (BATCH, 12)
  assert one['drop_path_noise'].shape[0] == BATCH
  for key in ('image', 'dropout_noise', 'drop_path_noise'):
    np.testing.assert_array_equal(one[key], again[key])
    assert (one[key] != other[key]).any()
  assert one['image'].dtype == jnp.uint8


def test_one_example_is_no_batch(model):
  graphdef, params = model
  batch = {key: value[:1] for key, value in _batch().items()}
  with pytest.raises(UserError, match=r'config\.batch_size=1: BatchNorm has no variance'):
    _task().prepare(nnx.merge(graphdef, params), batch, jax.random.key(0))


def test_learning_rates_and_decay_of_every_parameter_are_the_published_ones():
  golden = json.loads((GOLDEN / 'segmentation_layer_decay.json').read_text())
  config = segment_hivit_b.get_config()
  _, params = abstract_model(config.model.name, image_size=config.image_size)
  decay = config.optim.layer_decay
  scales = optim.layer_scales(params, decay, SegmentTask.encoder, SegmentTask.stem_is_one_layer)
  statistics = ((r'.*/(mean|var)', 'frozen'),)
  labels = rules.apply_rules((*statistics, *SegmentTask.rules), params)
  scales, labels = torch_names.flatten(scales), torch_names.flatten(labels)
  found = {}
  for path, leaf in torch_names.flatten(params).items():
    name, _ = torch_names.to_torch(path, np.empty((0,) * len(leaf.shape)))
    if labels[path] != 'frozen':
      found[name] = scales[path], config.optim.weight_decay if labels[path] == 'decay' else 0.0
  assert set(found) == set(golden)
  for name, (scale, decay) in golden.items():
    assert found[name] == (pytest.approx(scale, rel=1e-6), decay), name


def test_the_loss_is_that_of_enlarged_logits():
  """Against the definition, at a size that no eighth divides; see test_upernet for gradients."""
  from hivit_jax.models import resize
  from hivit_jax.tasks import pixels

  rng = np.random.default_rng(0)
  logits = rng.standard_normal((2, 5, 4, 3)).astype(np.float32)
  labels = rng.integers(0, 3, (2, 21, 17)).astype(np.uint8)
  labels[0, 3:7] = 255
  loss, right = pixels.cross_entropy(logits, labels, ignore_index=255)
  large = resize.bilinear(logits, (21, 17))
  log = np.asarray(jax.nn.log_softmax(large))
  known = labels != 255
  picked = np.take_along_axis(log, np.where(known, labels, 0)[..., None], axis=-1)[..., 0]
  assert_close(loss, -(picked * known).sum())
  assert right == ((large.argmax(-1) == labels) & known).sum()


def test_colours_of_grey_images_do_not_change():
  message = r'config\.segment\.photometric=True changes colours, but config\.channels=1'
  with pytest.raises(UserError, match=message):
    _task(channels=1, photometric=True)
