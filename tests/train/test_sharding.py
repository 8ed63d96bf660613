"""Devices: the mesh, what lies where, and that their number changes nothing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.ops import barriers
from hivit_jax.planning.collectives import collectives
from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.mae import MAETask
from hivit_jax.tasks.segment import SegmentTask
from hivit_jax.train import optim, sharding, step
from tests.helpers import TINY, abstract_model, marks_of, random_model
from tests.runs import on_eight_devices


def _mesh_of(data: int, fsdp: int = 1):
  return jax.sharding.AbstractMesh((data, fsdp), ('data', 'fsdp'))


@dataclasses.dataclass(frozen=True)
class _Device:
  id: int
  process_index: int


def test_mesh_takes_all_devices_or_some():
  assert dict(sharding.make_mesh().shape) == {'data': jax.device_count(), 'fsdp': 1}
  devices = [_Device(i, 0) for i in range(8)]
  assert dict(sharding.make_mesh(devices=devices).shape) == {'data': 8, 'fsdp': 1}
  assert dict(sharding.make_mesh(-1, 4, devices).shape) == {'data': 2, 'fsdp': 4}
  assert dict(sharding.make_mesh(3, 2, devices).shape) == {'data': 3, 'fsdp': 2}


def test_devices_of_a_process_stand_together():
  """Else another host's examples would get the random numbers of this one's."""
  devices = [_Device(i, process) for i, process in enumerate((0, 0, 1, 1, 0, 0, 1, 1))]
  for fsdp in (1, 2, 4):
    flat = sharding.make_mesh(-1, fsdp, devices).devices.flat
    assert [device.id for device in flat] == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize(
  ('data', 'fsdp', 'processes'),
  [(0, 1, 1), (-2, 1, 1), (9, 1, 1), (-1, 3, 1), (-1, 0, 1), (4, 4, 1), (4, 1, 2)],
)
def test_mesh_of_devices_that_there_are_not(data, fsdp, processes):
  message = f'data={data}, config.mesh.fsdp={fsdp}: there are 8 devices; --config.mesh.data=-1 uses'
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(data, fsdp, [_Device(i, i * processes // 8) for i in range(8)])


# --- what lies where


@pytest.mark.parametrize('name', ['hivit_tiny', 'mae_hivit_tiny', 'mae_vit_base', 'swin_tiny'])
def test_all_large_parameters_are_split(name):
  """What stays whole is less than a hundredth of the model."""
  _, params = abstract_model(name)
  shardings = sharding.state_shardings({'params': params, 'ema': params}, _mesh_of(2, 8))
  assert shardings['params'] == shardings['ema']
  whole = split = 0
  for leaf, place in zip(
    jax.tree.leaves(params), jax.tree.leaves(shardings['params']), strict=True
  ):
    if place.is_fully_replicated:
      whole += leaf.size
    else:
      split += leaf.size
      assert math.prod(place.shard_shape(leaf.shape)) == leaf.size // 8
  assert whole < 0.01 * split


def test_the_optimizers_numbers_lie_where_their_parameters_do():
  _, params = abstract_model('mae_hivit_tiny')
  for optimizer in (
    optim.adamw(
      params, rules=MAETask.rules, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0
    ),
    optim.lars(params, rules=MAETask.rules, momentum=0.9, weight_decay=0.1),
  ):
    trained, _ = optim.split(params, optimizer.trained)
    state = {'params': trained, 'opt_state': jax.eval_shape(optimizer.tx.init, trained)}
    shardings = sharding.state_shardings(state, _mesh_of(1, 4))
    split = [place for place in jax.tree.leaves(shardings['params']) if place.spec]
    found = [place for place in jax.tree.leaves(shardings['opt_state']) if place.spec]
    assert found == split * (len(found) // len(split))
    assert len(found) >= len(split) > 0


def test_one_device_a_copy_splits_nothing():
  _, params = abstract_model('hivit_tiny', **TINY)
  shardings = sharding.state_shardings(params, _mesh_of(8))
  assert all(place.is_fully_replicated for place in jax.tree.leaves(shardings))


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    *(pytest.param(name, {}, marks=marks_of(name)) for name in hivit_jax.list_models()),
    ('hivit_tiny', {'layer_scale': 0.1}),
    ('mae_itpn_base', {'target': 'saratrx_v2', 'channels': 1}),
  ],
)
def test_every_parameter_of_every_model_has_a_rule(name, options):
  _, params = abstract_model(name, **options)
  assert sharding.state_shardings({'params': params}, _mesh_of(8))


def test_a_leaf_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match='no rule says what to do with "params/head/gamma"'):
    sharding.state_shardings({'params': {'head': {'gamma': np.zeros(8)}}}, _mesh_of(8))


def test_an_axis_that_divides_nothing_is_an_error():
  _, params = abstract_model('hivit_tiny', **TINY)
  with pytest.raises(UserError, match=r'config\.mesh\.fsdp=7 divides none of the parameters'):
    sharding.state_shardings(params, _mesh_of(1, 7))


# --- batches


@pytest.mark.parametrize(
  ('batch', 'devices', 'parts', 'message'),
  [
    (
      10,
      8,
      1,
      r'=10 is not divisible by 8 devices; try --config.batch_size=8 or --config.batch_size=16',
    ),
    (
      100,
      4,
      3,
      r'=100 .* 4 devices x 3 accumulation steps; try --config.batch_size=96 or .*=108',
    ),
    (4, 8, 1, r'config\.batch_size=4 .*; try --config.batch_size=8$'),
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
    noise = batch['noise'].mean(axis=1).sum() / batch['count']  # a part's share in the mean
    return value, metrics | {'noise': noise}


class _Mixing(ClassifyTask):
  """The task, telling an average of its augmented images and targets as a metric."""

  def loss(self, model, batch):
    value, metrics = super().loss(model, batch)
    each = batch['image'].mean(axis=(1, 2, 3)) + batch['target'] @ jnp.arange(10.0)
    return value, metrics | {'noise': each.sum() / batch['count']}  # a part's share in the mean


class _Distorting(SegmentTask):
  """The task, telling an average of its distorted images and dropout noise as a metric."""

  def loss(self, model, batch):
    value, metrics = super().loss(model, batch)
    each = batch['image'].mean(axis=(1, 2, 3)) + 100 * batch['dropout_noise'].mean(axis=1)
    return value, metrics | {'noise': each.mean()}


# Groups of six in a batch of 16, the last of four: they lie across devices.
_GROUP = 6


def _start(mesh, accumulate_steps: int, name: str, group: int | None = _GROUP):
  """A training state, where its leaves lie, and the step."""
  size = {
    'image_size': 32, 'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2, 'drop_path_rate': 0.3
  }  # fmt: skip
  statistics = (0.5,) * 3, (0.25,) * 3
  if name == 'classify':
    graphdef, params = random_model('hivit_tiny', **size, num_classes=10)
    augment = {'erase': 0.5, 'mixup': 0.8, 'cutmix': 1.0, 'mix_group': group}
    task = _Mixing(*statistics, 10, label_smoothing=0.1, **augment)
  elif name == 'segment':
    # With BatchNorm, but without UPerNet, which compiles for long; test_segmentation trains that.
    head = {'num_classes': 10, 'linear_levels': (1, 3), 'position_image_size': 32}
    graphdef, params = random_model('segment_hivit_tiny', **size, **head)
    task = _Distorting(*statistics, (32, 32), 10, photometric=True, mean_over='labelled')
  else:
    decoder = {'decoder_embed_dim': 8, 'decoder_depth': 1, 'decoder_num_heads': 2}
    graphdef, params = random_model('mae_hivit_tiny', **size, **decoder)
    task = _Recording(*statistics)
  frozen = ((r'.*/(mean|var)', 'frozen'),)  # BatchNorm's
  optimizer = optim.adamw(
    params, rules=(*frozen, *task.rules),
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=None,
  )  # fmt: skip
  state = {
    'step': jnp.zeros((), jnp.int32),
    'params': params,
    'opt_state': jax.jit(optimizer.tx.init)(optim.split(params, optimizer.trained)[0]),
    'ema': params,
  }
  shardings = sharding.state_shardings(state, mesh)
  state = sharding.put(jax.tree.map(jnp.copy, state), shardings)
  train_step = step.make_train_step(
    graphdef,
    task,
    optimizer,
    lambda _: 1e-3,
    seed=0,
    abstract=state,
    accumulate_steps=accumulate_steps,
    ema_decay=0.9,
    compiler_options=barriers.compiler_options('cpu'),
  )
  return state, shardings, train_step


def _batch(number: int, mesh) -> dict:
  images = np.random.default_rng(number).integers(0, 256, (16, 32, 32, 3), np.uint8)
  labels = np.arange(16, dtype=np.int32) % 10
  maps = (images[..., 0] // 26).copy()
  maps[1, :30] = 255  # not counted: examples, and so devices, differ in what they have
  own = {'label': labels, 'label_map': maps, 'extent': np.full((16, 2), 32, np.int32)}
  batch = sharding.put_batch({'image': images, **own}, mesh)
  np.testing.assert_array_equal(sharding.fetch(batch['image']), images)
  return batch


def train(data: int, fsdp: int, accumulate_steps: int, name: str) -> dict:
  """Some steps on some of this process's devices: numbers, and where things lie."""
  mesh = sharding.make_mesh(data, fsdp)
  state, shardings, train_step = _start(mesh, accumulate_steps, name)
  losses, noise = [], []
  for number in range(_STEPS):
    batch = _batch(number, mesh)
    state, metrics = train_step(state, batch)
    losses.append(float(metrics['loss']))
    noise.append(float(metrics['noise']))
  assert jax.tree.map(lambda x: x.sharding, state) == shardings
  bytes_of = lambda shape: sum(math.prod(shape(leaf)) for leaf in jax.tree.leaves(state))  # noqa: E731
  whole = sharding.local(sharding.whole(state, mesh))
  return {
    'losses': losses,
    'noise': noise,
    'shards': [shard.data.shape[0] for shard in batch['image'].addressable_shards],
    'share': bytes_of(lambda x: x.addressable_data(0).shape) / bytes_of(lambda x: x.shape),
    'norm': float(metrics['param_norm']),
    'local_norm': _norm(whole['params']),
    'average': _norm(whole['ema']),
  }


def _norm(tree) -> float:
  return float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree))))


# (data, fsdp, accumulate_steps): each kind of split for some task.
_SPLITS = {
  'mae': ((8, 1, 2), (1, 8, 1)),
  'classify': ((2, 4, 2),),
  'segment': ((2, 4, 1),),  # BatchNorm needs the whole batch
}
_STEPS = 5


@pytest.mark.slow
@pytest.mark.parametrize('name', _SPLITS)
def test_the_number_of_devices_and_what_they_share_changes_nothing(forks, name):
  """Masks, mixing, distortion, dropout, statistics of BatchNorm and losses as on one."""
  splits = _SPLITS[name]
  code = f'[here.train(*split, {name!r}) for split in {splits}]'
  one = train(1, 1, 1, name)
  assert one['shards'] == [16]
  assert len(set(one['losses'])) == _STEPS
  for (_, fsdp, _), eight in zip(splits, on_eight_devices(forks, __name__, code), strict=True):
    assert eight['shards'] == [2] * 8
    assert 1 / fsdp <= eight['share'] < 1 / fsdp + 0.2
    np.testing.assert_allclose(eight['local_norm'], eight['norm'], rtol=1e-5)
    np.testing.assert_allclose(eight['average'], one['average'], rtol=1e-5)
    np.testing.assert_allclose(eight['noise'], one['noise'], rtol=1e-6)
    np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-6)


def moved(group: int | None) -> dict[str, int]:
  """Bytes that the compiled step of a classifier moves between devices, sums aside, by kind."""
  mesh = sharding.make_mesh(8, 1)
  state, _, train_step = _start(mesh, 1, 'classify', group)
  text = train_step.lower(state, _batch(0, mesh)).compile().as_text()
  sizes = {'collective-permute': 0, 'all-gather': 0, 'all-to-all': 0}
  for found in collectives(text, mesh.size):
    if found['kind'] in sizes:
      sizes[found['kind']] += found['bytes']
  return sizes


@pytest.mark.slow
def test_no_image_travels_between_devices_that_hold_whole_groups(forks):
  image = 4 * 32 * 32 * 3
  whole, split = on_eight_devices(forks, __name__, '[here.moved(2), here.moved(None)]')
  assert max(whole.values()) < image / 10  # the numbers that are drawn for groups
  assert split['collective-permute'] >= 2 * image  # a batch that is mirrored as a whole
