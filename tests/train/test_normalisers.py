"""What is ignored in a batch changes no gradient, however the batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hivit_jax.interop import torch_names
from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.detect import DetectTask
from hivit_jax.tasks.segment import SegmentTask
from hivit_jax.train import optim, sharding, step
from tests.helpers import random_model
from tests.own.dense import IGNORED, DenseModel, DenseTask
from tests.runs import on_eight_devices

STATISTICS = {'mean': (0.5,) * 3, 'std': (0.25,) * 3}
BATCH, SIDE = 32, 32


def _classification():
  model = {'image_size': SIDE, 'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2}
  graphdef, params = random_model('hivit_tiny', **model, num_classes=5, drop_path_rate=0.3)
  labels = np.arange(BATCH, dtype=np.int32) % 5
  labels[[1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 21]] = -1  # all of one device's, none of another's
  task = ClassifyTask(**STATISTICS, num_classes=5, label_smoothing=0.1)
  return graphdef, params, task, {'label': labels}


def _segmentation():
  model = DenseModel(num_classes=3, normalised=False, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  labels = np.random.default_rng(1).integers(0, 3, (BATCH, SIDE, SIDE)).astype(np.uint8)
  for i in range(BATCH):
    labels[i, : i % SIDE] = IGNORED
  labels[4:8] = IGNORED
  task = DenseTask(**STATISTICS, num_classes=3)
  return graphdef, nnx.to_pure_dict(params), task, {'segmentation': labels}


def _upernet():
  model = {'image_size': SIDE, 'position_image_size': SIDE, 'embed_dim': 16, 'depths': (1, 1, 1)}
  model |= {'num_heads': 2, 'num_classes': 3, 'head_channels': 8, 'auxiliary_channels': 4}
  model |= {'drop_path_rate': 0.3, 'dtype': 'float64'}
  graphdef, params = random_model('segment_hivit_tiny', **model)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  task = SegmentTask(**STATISTICS, image_size=(SIDE, SIDE), num_classes=3, photometric=True)
  labels = _segmentation()[-1]['segmentation']
  extent = np.full((BATCH, 2), SIDE, np.int32)
  return graphdef, params, task, {'label_map': labels, 'extent': extent}


def _detection():
  """An image a device, of two sizes; three of eight have no object, one has all five slots full."""
  model = {'image_size': SIDE, 'position_image_size': SIDE, 'embed_dim': 16, 'depths': (1, 1, 1)}
  model |= {'num_heads': 2, 'num_classes': 3, 'window_size': 2, 'global_blocks': (0,)}
  model |= {'neck_channels': 4, 'hidden': 8, 'nms_pre': (16, 16), 'proposals': 8}
  model |= {'anchor_scale': 4.0, 'drop_path_rate': 0.3, 'dtype': 'float64'}
  graphdef, params = random_model('detect_hivit_tiny', **model)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  task = DetectTask(**STATISTICS, num_classes=3, anchors=12, rois=8)
  rng, slots, objects = np.random.default_rng(2), 5, np.array([0, 5, 1, 0, 3, 2, 0, 4])
  corner = rng.uniform(0, 12, (8, slots, 2))
  return graphdef, params, task, {
    'image': rng.integers(0, 256, (8, SIDE, SIDE, 3), np.uint8),
    'size': np.array([[SIDE, SIDE], [SIDE, 24]] * 4, np.int32),
    'boxes': np.concatenate([corner, corner + rng.uniform(4, 12, (8, slots, 2))], axis=2),
    'labels': rng.integers(0, 3, (8, slots)).astype(np.int32),
    'exists': np.arange(slots) < objects[:, None],
    'masks': rng.integers(0, 256, (8, slots, 112, 112)).astype(np.uint8),
  }  # fmt: skip


KINDS = {'classify': _classification, 'segment': _segmentation}
WHOLE = {'upernet': _upernet, 'detect': _detection}  # BatchNorm takes others from parts


def _remembering(params) -> optim.Optimizer:
  """An optimizer that does nothing but keep the gradients as its state."""
  zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
  tx = optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))
  return optim.Optimizer(tx, jax.tree.map(lambda _: True, params))


def gradients(kind: str, devices: int, accumulate_steps: int) -> dict:
  """Gradients of the first step, before the optimizer, and its metrics, as lists.

  With BatchNorm in float64: what is left of an example after its batch's mean is subtracted has
  few digits in float32, and a sum in another order changes gradients by up to 1e-4 of their norm.
  """
  with jax.enable_x64(kind in WHOLE):
    return _gradients(kind, devices, accumulate_steps)


def _gradients(kind: str, devices: int, accumulate_steps: int) -> dict:
  graphdef, params, task, batch = (KINDS | WHOLE)[kind]()
  images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
  mesh = sharding.make_mesh(devices)
  optimizer = _remembering(params)
  state = {'step': jnp.zeros((), jnp.int32), 'params': params}
  state['opt_state'] = optimizer.tx.init(params)
  state = sharding.put(jax.tree.map(jnp.copy, state), sharding.state_shardings(state, mesh))
  train_step = step.make_train_step(
    graphdef, task, optimizer, lambda _: 0.1,
    seed=0, abstract=state, accumulate_steps=accumulate_steps,
  )  # fmt: skip
  state, metrics = train_step(state, sharding.put_batch({'image': images, **batch}, mesh))
  flat = torch_names.flatten(jax.device_get(state['opt_state']))
  return {
    'gradients': {'/'.join(path): value.tolist() for path, value in flat.items()},
    'metrics': {key: float(value) for key, value in metrics.items()},
  }


def _on_eight_devices(forks, *cases: tuple[str, int]) -> list[dict]:
  """`gradients` of kinds in so many parts, in a process with eight simulated devices."""
  code = f'[here.gradients(kind, 8, parts) for kind, parts in {cases}]'
  return on_eight_devices(forks, __name__, code)


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_ignored_is_ignored_on_any_number_of_devices_and_in_any_parts(forks, kind):
  whole = gradients(kind, 1, 1)
  assert all(np.any(value) for value in whole['gradients'].values())
  for split in (gradients(kind, 1, 4), *_on_eight_devices(forks, (kind, 1), (kind, 4))):
    assert split['metrics'] == pytest.approx(whole['metrics'], rel=1e-5)
    for name, expected in whole['gradients'].items():
      difference = np.linalg.norm(np.subtract(split['gradients'][name], expected).ravel())
      assert difference <= 1e-5 * np.linalg.norm(np.ravel(expected)), name


def test_batch_norm_has_the_statistics_of_all_devices(forks):
  """And ignored pixels, dropout, drop path and photometric distortion are those of the batch.

  So are anchors, proposals, RoIs and their losses, however few objects an image has.
  """
  for kind, split in zip(
    WHOLE, _on_eight_devices(forks, *((kind, 1) for kind in WHOLE)), strict=True
  ):
    whole = gradients(kind, 1, 1)
    assert split['metrics'] == pytest.approx(whole['metrics'], rel=1e-6), kind
    found, expected = (
      np.concatenate([np.ravel(x) for x in one['gradients'].values()]) for one in (split, whole)
    )
    assert np.linalg.norm(found - expected) <= 1e-9 * np.linalg.norm(expected), kind
    if kind == 'detect':
      assert all(whole['metrics'][f'loss_{name}'] > 0 for name in ('rpn_box', 'box', 'mask'))


@pytest.mark.parametrize('kind', KINDS)
def test_the_gradient_is_that_of_the_mean_over_what_is_labelled(kind):
  """By the definition, without parts: gradients of single examples, weighted by what is known."""
  graphdef, params, task, batch = KINDS[kind]()
  images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
  rng = jax.random.fold_in(jax.random.key(0), 0)
  batch = task.prepare(nnx.merge(graphdef, params), {'image': images, **batch}, rng)

  def loss(params, example):
    model = nnx.merge(graphdef, params)
    one = {key: value[None] if jnp.ndim(value) else 1.0 for key, value in example.items()}
    return task.loss(model, one)[0]

  rows = {key: value for key, value in batch.items() if jnp.ndim(value)}
  each = jax.jit(
    lambda params: jax.lax.map(lambda row: jax.grad(loss)(params, row | {'count': 1.0}), rows)
  )(params)
  total = jax.tree.map(lambda g: np.asarray(g).sum(axis=0) / float(batch['count']), each)
  found = gradients(kind, 1, 1)['gradients']
  for path, expected in torch_names.flatten(total).items():
    difference = np.linalg.norm(np.subtract(found['/'.join(path)], expected).ravel())
    assert difference <= 1e-5 * np.linalg.norm(expected.ravel()), path
