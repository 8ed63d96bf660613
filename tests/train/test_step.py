"""The training step: what it computes, in how many parts, and where its randomness comes from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.interop import torch_names
from hivit_jax.planning.flops import matmul_flops
from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.images import normalize
from hivit_jax.tasks.linear import LinearTask
from hivit_jax.tasks.mae import MAETask
from hivit_jax.train import optim, sharding, step
from hivit_jax.train.schedules import Schedule
from tests.helpers import assert_close, assert_trees_close, random_model
from tests.own.dense import DenseModel, DenseTask

MODEL = {
  'image_size': (32, 64), 'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2,
  'decoder_embed_dim': 8, 'decoder_depth': 1, 'decoder_num_heads': 2, 'drop_path_rate': 0.5,
}  # fmt: skip
BATCH = 8
TASK = MAETask(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
ADAMW = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.3, 'clip_norm': None}


class Recording(MAETask):
  """The task, telling the random numbers of a step with its metrics."""

  def loss(self, model, batch):
    value, metrics = super().loss(model, batch)
    return value, metrics | {key: batch[key] for key in ('noise', 'drop_path_noise')}


def _batch(seed: int = 0) -> dict:
  images = np.random.default_rng(seed).integers(0, 256, (BATCH, 32, 64, 3), np.uint8)
  return {'image': images}


def _all(tx: optax.GradientTransformation, params) -> optim.Optimizer:
  return optim.Optimizer(tx, jax.tree.map(lambda _: True, params))


def _sgd(params):
  return _all(optax.identity(), params)


def _adamw(params, first=(), **options):
  return optim.adamw(params, rules=(*first, *MAETask.rules), **ADAMW | options)


def _training(make_optimizer=_adamw, *, task=TASK, seed=0, schedule=lambda _: 0.1, **options):
  """A state at step 0 and the step."""
  graphdef, params = random_model('mae_hivit_tiny', **MODEL)
  optimizer = make_optimizer(params)
  state = {
    'step': jnp.zeros((), jnp.int32),
    'params': params,
    'opt_state': jax.jit(optimizer.tx.init)(optim.split(params, optimizer.trained)[0]),
  }
  return state, step.make_train_step(graphdef, task, optimizer, schedule, seed=seed, **options)


def _remembering(optimizer: optim.Optimizer) -> optim.Optimizer:
  """`optimizer`, with the last gradients in its state."""
  tx = optimizer.tx

  def update(grads, state, params=None):
    updates, inner = tx.update(grads, state[0], params)
    return updates, (inner, grads)

  remembering = optax.GradientTransformation(
    lambda params: (tx.init(params), jax.tree.map(jnp.zeros_like, params)), update
  )
  return optimizer._replace(tx=remembering)


@pytest.mark.slow
def test_five_steps_equal_those_of_torch_adamw():
  torch = pytest.importorskip('torch')
  state, train_step = _training(
    lambda params: _remembering(_adamw(params)),
    schedule=Schedule(lr=0.05, end_lr=0.01, warmup_start_lr=0.02, warmup=2.0, length=6.0),
  )
  start = jax.device_get(torch_names.flatten(state['params']))
  theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start.items()}
  frozen = ('decoder_pos_embed',)
  groups = [
    [p for path, p in theirs.items() if path != frozen and (p.ndim > 1) == decay]
    for decay in (True, False)
  ]
  adamw = torch.optim.AdamW(
    [{'params': groups[0], 'weight_decay': 0.3}, {'params': groups[1], 'weight_decay': 0.0}],
    betas=(0.9, 0.95),
    eps=1e-8,
  )
  # By hand: half an epoch a step, one epoch of warmup, then a cosine over two.
  rates = [0.02, 0.035, 0.05, 0.01 + 0.02 * (1 + np.cos(np.pi / 4)), 0.03]
  for number, rate in enumerate(rates):
    state, metrics = train_step(state, _batch(number))
    np.testing.assert_allclose(metrics['learning_rate'], rate, rtol=1e-5)
    grads = jax.device_get(torch_names.flatten(state['opt_state'][1]))
    for path, p in theirs.items():
      p.grad = None if path == frozen else torch.tensor(grads[path])
    for group in adamw.param_groups:
      group['lr'] = rate
    adamw.step()
    squares = [np.square(g.astype(np.float64)).sum() for g in grads.values() if g is not None]
    norm = np.sqrt(sum(squares))
    np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  assert state['step'] == 5
  ours = jax.device_get(torch_names.flatten(state['params']))
  for path, p in theirs.items():
    assert_close(ours[path], p.detach().numpy(), relative=2e-6, name='/'.join(path))
    if path != frozen:
      assert np.abs(ours[path] - start[path]).max() > 0.05
  np.testing.assert_array_equal(ours[frozen], start[frozen])


@pytest.mark.slow
def test_layer_decay_scales_the_whole_update_weight_decay_included():
  """The whole rate of a layer, or what depends on the peak in it."""
  ends = {}
  for decay, scaled in ((None, 'rate'), (0.5, 'rate'), (0.5, 'peak')):
    schedule = Schedule(
      lr=0.05, end_lr=0.01, warmup_start_lr=0.02, warmup=2.0, length=6.0, scaled=scaled
    )
    state, train_step = _training(functools.partial(_adamw, layer_decay=decay), schedule=schedule)
    start = jax.device_get(torch_names.flatten(state['params']))
    state, metrics = train_step(state, _batch())
    assert metrics['learning_rate'] == pytest.approx(0.02)
    ends[decay, scaled] = jax.device_get(torch_names.flatten(state['params']))
  scales = torch_names.flatten(optim.layer_scales(torch_names.unflatten(start), 0.5))
  assert len(set(scales.values())) > 4
  for path, end in ends[None, 'rate'].items():
    for scaled, ratio in (('rate', scales[path]), ('peak', 1.0)):  # nothing of the peak at epoch 0
      expected = start[path] + ratio * (end - start[path])
      np.testing.assert_allclose(
        ends[0.5, scaled][path], expected, atol=1e-6, err_msg=f'{scaled} {"/".join(path)}'
      )


@pytest.mark.slow
def test_accumulated_steps_equal_those_of_the_large_batch():
  """With drop path and masks: every example gets the same numbers in whatever part it is. What is
  clipped is the sum of the parts; the norm that is reported is the one before."""
  results = {}
  for parts in (1, 4):
    state, train_step = _training(
      lambda params: _all(optax.clip_by_global_norm(0.5), params),
      schedule=lambda _: 0.3,
      accumulate_steps=parts,
    )
    told = []
    for number in range(3):
      before = jax.device_get(state['params'])
      state, metrics = train_step(state, _batch(number))
      told.append([metrics['loss'], metrics['grad_norm']])
      moved = optax.tree.norm(jax.tree.map(np.subtract, jax.device_get(state['params']), before))
      assert metrics['grad_norm'] > 0.6
      np.testing.assert_allclose(moved, 0.3 * 0.5, rtol=1e-4)
    results[parts] = told, state['params']
  np.testing.assert_allclose(results[4][0], results[1][0], rtol=2e-6)
  assert_trees_close(results[4][1], results[1][1], relative=2e-6)


@pytest.mark.slow
def test_randomness_is_a_function_of_seed_and_step():
  fresh, train_step = _training(_sgd, task=Recording(TASK.mean, TASK.std), seed=1)
  _, other_seed = _training(_sgd, task=Recording(TASK.mean, TASK.std), seed=2)

  def numbers(train_step, steps, start=0):
    """Of the last of some steps; state and images depend on where they start."""
    state = jax.tree.map(jnp.copy, fresh) | {'step': jnp.asarray(start, jnp.int32)}
    for number in range(steps):
      state, metrics = train_step(state, _batch(10 * start + number))
    return {key: np.asarray(metrics[key]) for key in ('noise', 'drop_path_noise')}

  fourth = numbers(train_step, 4)
  jax.tree.map(np.testing.assert_array_equal, fourth, numbers(train_step, 1, start=3))
  assert fourth['noise'].shape == (BATCH, 8)
  assert fourth['drop_path_noise'].shape == (BATCH, 5, 2)
  for others in (numbers(train_step, 1, start=2), numbers(other_seed, 1, start=3)):
    for key, values in fourth.items():
      assert len({row.tobytes() for row in values}) == BATCH  # every example has its own
      assert (values != others[key]).all()
  assert not np.isin(fourth['noise'], fourth['drop_path_noise']).any()


def test_drop_path_numbers_are_only_drawn_when_needed():
  graphdef, params = random_model('mae_hivit_tiny', **MODEL | {'drop_path_rate': 0.0})
  prepared = TASK.prepare(nnx.merge(graphdef, params), _batch(), jax.random.key(0))
  assert set(prepared) == {'image', 'noise', 'count'}


@pytest.mark.slow
def test_the_state_is_donated_and_the_loss_falls():
  state, train_step = _training(schedule=lambda _: 0.003)
  losses = []
  for _ in range(12):
    old = state
    state, metrics = train_step(state, _batch())
    losses.append(metrics['loss'])
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.05
  assert metrics['loss'].shape == ()
  np.testing.assert_allclose(metrics['param_norm'], optax.tree.norm(state['params']), rtol=1e-5)


def test_initial_state_is_what_the_abstract_one_says():
  """Checkpoints are restored by the abstract state: structure, shapes, types and places agree."""
  mesh = sharding.make_mesh(1)
  sizes = MODEL | {'image_size': 32, 'embed_dim': 8}
  create = lambda: hivit_jax.create_model('mae_hivit_tiny', **sizes)  # noqa: E731
  _, optimizer, abstract = step.abstract_state(create, _adamw, mesh, ema=True)
  state = step.init_state(create, optimizer, abstract)
  describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)  # noqa: E731
  assert jax.tree.structure(state) == jax.tree.structure(abstract)
  assert jax.tree.map(describe, state) == jax.tree.map(describe, abstract)
  assert state['step'] == 0
  model = nnx.to_pure_dict(nnx.state(create()))
  jax.tree.map(np.testing.assert_array_equal, state['params'], model)
  jax.tree.map(np.testing.assert_array_equal, state['ema'], model)


# --- averages, running statistics, linear probes


CLASSIFIER = {'image_size': 32, 'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2}


def _classifier(optimizer, *, schedule=lambda _: 0.1, ema=False, **options):
  """State and step of a classifier of 5 classes with BatchNorm before its last layer."""
  create = lambda: hivit_jax.create_model(  # noqa: E731
    'hivit_tiny', **CLASSIFIER, num_classes=5, head_batch_norm=True
  )
  mesh = sharding.make_mesh(1)
  graphdef, optimizer, abstract = step.abstract_state(create, optimizer, mesh, ema=ema)
  task = ClassifyTask(mean=(0.5,), std=(0.25,), num_classes=5)
  state = step.init_state(create, optimizer, abstract)
  train_step = step.make_train_step(graphdef, task, optimizer, schedule, seed=0, **options)
  return state, train_step, graphdef


def _labelled(seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
  return {'image': images, 'label': rng.integers(0, 5, BATCH, np.int32)}


def _lars(params, first=()):
  return optim.lars(params, rules=(*first, *LinearTask.rules), momentum=0.9, weight_decay=0.0)


def _classify_adamw(params, first=()):
  return optim.adamw(params, rules=(*first, *ClassifyTask.rules), **ADAMW)


def test_the_average_follows_the_parameters():
  state, train_step, _ = _classifier(_classify_adamw, ema=True, ema_decay=0.7)
  average = jax.device_get(state['params'])
  jax.tree.map(np.testing.assert_array_equal, state['ema'], average)
  for number in range(3):
    state, _ = train_step(state, _labelled(number))
    average = jax.tree.map(lambda a, p: 0.7 * a + 0.3 * np.asarray(p), average, state['params'])
  assert_trees_close(state['ema'], average)
  moved = np.abs(state['ema']['head']['kernel'] - state['params']['head']['kernel'])
  assert moved.max() > 0.01


@pytest.mark.parametrize('parts', [1, 2])
def test_a_linear_probe_changes_the_last_layer_and_the_statistics_before_it(parts):
  state, train_step, graphdef = _classifier(_lars, accumulate_steps=parts)
  before = jax.device_get(state['params'])
  batch = _labelled()
  model = nnx.merge(graphdef, before)
  features = np.asarray(model.fc_norm(model.pooled(normalize(batch['image'], (0.5,), (0.25,)))))
  state, _ = train_step(state, batch)
  after = jax.device_get(state['params'])
  groups = [features] if parts == 1 else [features[0::2], features[1::2]]
  means = np.mean([group.mean(axis=0) for group in groups], axis=0)
  variances = np.mean([group.var(axis=0) for group in groups], axis=0)
  assert_close(after['head_norm']['mean'], 0.1 * means)
  assert_close(after['head_norm']['var'], 0.9 + 0.1 * variances)
  for tree in (before, after):
    assert tree.pop('head_norm').keys() == {'mean', 'var'}
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  assert {key for key, tree in changed.items() if any(jax.tree.leaves(tree))} == {'head'}
  assert all(jax.tree.leaves(changed['head']))


def test_a_linear_probe_differentiates_nothing_but_the_last_layer():
  """So its step costs little more than a forward pass."""
  state, probe, graphdef = _classifier(_lars)
  forward = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
  images = normalize(_labelled()['image'], (0.5,), (0.25,))
  share = matmul_flops(probe, state, _labelled()) / matmul_flops(forward, state['params'], images)
  assert share < 1.05


def test_statistics_inside_any_model_follow_the_batch_and_are_averaged():
  """Those of parts all begin with the old ones, and their mean is kept; no moments are."""
  images = np.random.default_rng(0).integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
  labels = np.random.default_rng(1).integers(0, 3, (BATCH, 16, 16)).astype(np.uint8)
  task = DenseTask(mean=(0.5,), std=(0.25,), num_classes=3)
  create = lambda: DenseModel(num_classes=3, rngs=nnx.Rngs(0))  # noqa: E731

  def make_optimizer(params, first=()):
    return optim.adamw(params, rules=(*first, *task.rules), **ADAMW)

  before = DenseModel(num_classes=3, rngs=nnx.Rngs(0))
  stem = np.asarray(before.stem(normalize(images, (0.5,), (0.25,))))
  for parts in (1, 2):
    graphdef, optimizer, abstract = step.abstract_state(
      create, make_optimizer, sharding.make_mesh(1), ema=True
    )
    assert optimizer.trained['norm'] == {'bias': True, 'scale': True, 'mean': False, 'var': False}
    state = step.init_state(create, optimizer, abstract)
    train_step = step.make_train_step(
      graphdef, task, optimizer, lambda _: 0.1, seed=0,
      accumulate_steps=parts, ema_decay=0.8,
    )  # fmt: skip
    state, _ = train_step(state, {'image': images, 'segmentation': labels})
    groups = [stem[i::parts].reshape(-1, stem.shape[-1]) for i in range(parts)]
    expected = {
      'mean': 0.1 * np.mean([group.mean(axis=0) for group in groups], axis=0),
      'var': 0.9 + 0.1 * np.mean([group.var(axis=0) for group in groups], axis=0),
    }
    for key, start in (('mean', 0), ('var', 1)):
      assert_close(state['params']['norm'][key], expected[key])
      assert_close(state['ema']['norm'][key], 0.8 * start + 0.2 * expected[key])
