"""Devices: the mesh, what lies where, and that their number changes nothing."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.errors import UserError
from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.mae import MAETask
from hivit_jax.train import optim, sharding, step
from tests.helpers import random_model

ROOT = pathlib.Path(__file__).parents[2]


def _mesh_of(size: int):
  return jax.sharding.AbstractMesh((size,), ('data',))


def test_mesh_takes_all_devices_or_some():
  assert sharding.make_mesh().size == jax.device_count()
  assert sharding.make_mesh(1).size == 1
  assert sharding.make_mesh(1).axis_names == ('data',)


@pytest.mark.parametrize('devices', [0, -2, 10_000])
def test_mesh_of_devices_that_there_are_not(devices):
  message = f'config.mesh.data={devices}: there are {jax.device_count()} devices; -1 takes all'
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(devices)


@pytest.mark.parametrize(
  ('batch', 'devices', 'parts', 'message'),
  [
    (10, 8, 1, r'config\.batch_size=10 is not divisible by 8 devices; try 8 or 16'),
    (100, 4, 3, r'config\.batch_size=100 .* 4 devices x 3 accumulation steps; try 96 or 108'),
    (4, 8, 1, r'config\.batch_size=4 .*; try 8$'),
  ],
)
def test_batches_that_do_not_split(batch, devices, parts, message):
  with pytest.raises(UserError, match=message):
    sharding.check_batch_size(batch, _mesh_of(devices), parts)


def test_batches_that_split():
  sharding.check_batch_size(96, _mesh_of(8), 4)
  sharding.check_batch_size(7, _mesh_of(1))
  with pytest.raises(UserError, match=r'config\.evaluation\.batch_size=9 '):
    sharding.check_batch_size(9, _mesh_of(2), key='evaluation.batch_size')


class _Recording(MAETask):
  """The task, telling its masking noise as a metric."""

  def loss(self, model, batch):
    value, metrics = super().loss(model, batch)
    return value, metrics | {'noise': batch['noise'].mean()}


class _Mixing(ClassifyTask):
  """The task, telling an average of its augmented images and targets as a metric."""

  def loss(self, model, batch):
    value, metrics = super().loss(model, batch)
    weights = jnp.arange(10.0)
    return value, metrics | {'noise': batch['image'].mean() + (batch['target'] @ weights).mean()}


def train(devices: int, accumulate_steps: int, *, classify: bool = False) -> dict:
  """Five steps on some of this process's devices: numbers, and where things lie."""
  mesh = sharding.make_mesh(devices)
  size = {
    'image_size': 32, 'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2, 'drop_path_rate': 0.3
  }  # fmt: skip
  statistics = (0.5,) * 3, (0.25,) * 3
  if classify:
    graphdef, params = random_model('hivit_tiny', **size, num_classes=10)
    task = _Mixing(*statistics, 10, label_smoothing=0.1, erase=0.5, mixup=0.8, cutmix=1.0)
  else:
    decoder = {'decoder_embed_dim': 8, 'decoder_depth': 1, 'decoder_num_heads': 2}
    graphdef, params = random_model('mae_hivit_tiny', **size, **decoder)
    task = _Recording(*statistics)
  optimizer = optim.adamw(
    params, rules=optim.CLASSIFY_RULES if classify else optim.PRETRAIN_RULES,
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=None,
  )  # fmt: skip
  state = {
    'step': jnp.zeros((), jnp.int32),
    'params': params,
    'opt_state': jax.jit(optimizer.tx.init)(optim.split(params, optimizer.trained)[0]),
  }
  state = jax.device_put(state, sharding.replicated(mesh))
  train_step = step.make_train_step(
    graphdef,
    task,
    optimizer,
    lambda _: 1e-3,
    epochs_per_step=1.0,
    seed=0,
    accumulate_steps=accumulate_steps,
    compiler_options=sharding.compiler_options(mesh) | {'xla_backend_optimization_level': '0'},
  )
  losses, noise = [], []
  for number in range(5):
    images = np.random.default_rng(number).integers(0, 256, (16, 32, 32, 3), np.uint8)
    labels = np.arange(16, dtype=np.int32) % 10
    batch = sharding.put_batch({'image': images, 'label': labels}, mesh)
    np.testing.assert_array_equal(sharding.fetch(batch['image']), images)
    state, metrics = train_step(state, batch)
    losses.append(float(metrics['loss']))
    noise.append(float(metrics['noise']))
  leaves = jax.tree.leaves(state)
  return {
    'losses': losses,
    'noise': noise,
    'shards': [shard.data.shape[0] for shard in batch['image'].addressable_shards],
    'replicated': all(leaf.sharding.is_fully_replicated for leaf in leaves),
    'on_devices': [len(leaf.sharding.device_set) for leaf in (batch['image'], *leaves)],
    'norm': float(metrics['param_norm']),
    'local_norm': float(jnp.sqrt(sum(
      jnp.square(leaf).sum() for leaf in jax.tree.leaves(sharding.local(state['params']))
    ))),
  }  # fmt: skip


@pytest.mark.parametrize('classify', [False, True], ids=['mae', 'classify'])
def test_the_number_of_devices_changes_nothing(classify):
  """Eight of them, simulated, in a process of their own: masks, mixing and losses as on one."""
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu',
  }  # fmt: skip
  code = (
    'import json; from tests.train.test_sharding import train; '
    f'print(json.dumps(train(8, 2, classify={classify})))'
  )
  child = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert child.returncode == 0, child.stderr
  eight = json.loads(child.stdout.splitlines()[-1])
  assert eight['shards'] == [2] * 8
  assert eight['replicated']
  assert set(eight['on_devices']) == {8}
  np.testing.assert_allclose(eight['local_norm'], eight['norm'], rtol=1e-5)

  one = train(1, 1, classify=classify)
  assert one['shards'] == [16]
  np.testing.assert_allclose(eight['noise'], one['noise'], rtol=1e-6)
  np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-6)
  assert len(set(one['losses'])) == 5
