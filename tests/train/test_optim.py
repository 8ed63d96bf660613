"""What the optimizer does to which parameter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hivit_jax
from configs import finetune_hivit_t
from hivit_jax.interop import torch_names
from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.detect import DetectTask
from hivit_jax.tasks.linear import LinearTask
from hivit_jax.tasks.mae import MAETask
from hivit_jax.tasks.segment import SegmentTask
from hivit_jax.train import assemble, optim, rules
from tests.helpers import TINY, TINY_MAE, abstract_model

ADAM = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.0, 'clip_norm': None}
STATISTICS = ('mean', 'var')  # of BatchNorm
SKIPPED = 'large|swin|detect|segment'
MODELS = [(name, {}) for name in hivit_jax.list_models() if not re.search(SKIPPED, name)]
MODELS += [
  ('hivit_tiny', TINY | {'rpe': False}),
  ('mae_hivit_tiny', TINY_MAE | {'rpe': True}),
  ('mae_hivit_tiny', TINY_MAE | {'hifeat': False}),
]


def _params():
  """One parameter of each kind, with the names that the rules know."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
  return {
    'norm': {'scale': draw(4), 'bias': draw(4)},
    'head': {'kernel': draw(4, 3), 'bias': draw(3)},
    'mask_token': draw(1, 1, 4),
    'decoder_pos_embed': draw(1, 2, 4),
  }


def _adamw(params, **options):
  return optim.adamw(params, rules=MAETask.rules, **ADAM | options)


def _trained(params):
  """The parameters that `_adamw` trains."""
  return optim.split(params, _adamw(params).trained)[0]


# --- rules


@pytest.mark.parametrize(('name', 'overrides'), MODELS)
def test_everything_but_vectors_decays(name, overrides):
  """As the official pretraining has it; the fixed position embeddings are out of it."""
  _, params = abstract_model(name, **overrides)
  labels = torch_names.flatten(rules.apply_rules(MAETask.rules, params))
  expected = {}
  for path, leaf in torch_names.flatten(params).items():
    fixed = path[-1] in ('decoder_pos_embed', 'pos_embed')
    expected[path] = 'frozen' if fixed else 'decay' if leaf.ndim > 1 else 'no_decay'
  assert labels == expected


@pytest.mark.parametrize(
  ('name', 'task'), [('segment_swin_base', SegmentTask), ('detect_swin_base', DetectTask)]
)
def test_tables_of_relative_positions_do_not_decay_in_dense_tasks(name, task):
  """As in the configs of mmsegmentation and mmdetection for Swin."""
  _, state = abstract_model(name)
  params = {p: leaf for p, leaf in torch_names.flatten(state).items() if p[-1] not in STATISTICS}
  labels = torch_names.flatten(rules.apply_rules(task.rules, torch_names.unflatten(params)))
  tables = [path for path in labels if path[-1] == 'relative_position_bias_table']
  assert len(tables) == 24
  assert {labels[path] for path in tables} == {'no_decay'}
  assert {label for path, label in labels.items() if path[-1] == 'kernel'} == {'decay'}


@pytest.mark.parametrize(
  'path',
  [('blocks', 0, 'gamma'), ('head', 'kernels'), ('head', 'unscale'), ('decoder_pos_embeds',)],
)
def test_a_parameter_without_a_rule_is_an_error(path):
  params = torch_names.unflatten({tuple(map(str, path)): np.zeros((2, 2))})
  with pytest.raises(ValueError, match=f'no rule .* "{"/".join(map(str, path))}"'):
    _adamw(params | {'mask_token': np.zeros((1, 1, 2))})


def test_the_first_rule_decides():
  pairs = (('a/.*', 'first'), ('.*', 'second'))
  labels = rules.apply_rules(pairs, {'a': {'b': 0}, 'c': {'a': 0}, 'aa': 0})
  assert labels == {'a': {'b': 'first'}, 'c': {'a': 'second'}, 'aa': 'second'}


# --- updates


def test_weight_decay_is_of_the_parameters_that_decay():
  params = _trained(_params())
  tx = _adamw(params, weight_decay=0.3).tx
  no_gradients = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(no_gradients, tx.init(params), params)
  flat, values = torch_names.flatten(updates), torch_names.flatten(params)
  assert flat.pop(('decoder_pos_embed',)) is None
  for path, update in flat.items():
    decays = path in {('head', 'kernel'), ('mask_token',)}
    expected = 0.3 * values[path] if decays else jnp.zeros_like(update)
    np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))


def test_frozen_parameters_get_no_update_and_have_no_state():
  params = _trained(_params())
  tx = _adamw(params, weight_decay=0.3, clip_norm=1.0).tx
  state = tx.init(params)
  gradients = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
  updates, state = tx.update(gradients, state, params)
  assert updates.pop('decoder_pos_embed') is None
  assert all((leaf != 0).all() for leaf in jax.tree.leaves(updates))

  names = {rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
  assert any('mask_token' in name for name in names)
  assert not any('decoder_pos_embed' in name for name in names)
  trained = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * trained + 1  # and a counter


@pytest.mark.parametrize('optimizer', ['adamw', 'lars'])
def test_moments_lie_under_the_names_of_their_parameters(optimizer):
  """So a checkpoint's moments can be found, and those of one model be read by name."""
  params = _trained(_params())
  if optimizer == 'adamw':
    tx = _adamw(params, clip_norm=1.0).tx
  else:
    tx = optim.lars(params, rules=MAETask.rules, momentum=0.9, weight_decay=0.1).tx
  names = [
    rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tx.init(params))
  ]
  own = {'/'.join(path) for path, x in torch_names.flatten(params).items() if x is not None}
  prefixes = ('1/mu/', '1/nu/') if optimizer == 'adamw' else ('3/trace/',)
  expected = {prefix + name for prefix in prefixes for name in own}
  assert set(names) - {'1/count'} == expected


def _first_moment(state):
  is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
  (adam,) = (node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node))
  return adam.mu


def test_gradients_are_clipped_to_their_global_norm():
  params = _trained(_params())
  gradients = jax.tree.map(jnp.ones_like, params)
  norm = float(optax.tree.norm(gradients))
  moments = {}
  for clip in (None, norm / 4, norm * 4):
    tx = _adamw(params, clip_norm=clip).tx
    moments[clip] = _first_moment(tx.update(gradients, tx.init(params), params)[1])
    expected = norm if clip is None else min(norm, clip)
    np.testing.assert_allclose(optax.tree.norm(moments[clip]), 0.1 * expected, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, moments[None], moments[norm * 4])


def test_a_run_can_go_on_with_another_clipping():
  params = _trained(_params())
  states = [_adamw(params, clip_norm=clip).tx.init(params) for clip in (None, 1.0)]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_split_and_join():
  params = {'a': 1, 'b': {'c': 2, 'd': 3}}
  trained, others = optim.split(params, {'a': True, 'b': {'c': False, 'd': True}})
  assert trained == {'a': 1, 'b': {'c': None, 'd': 3}}
  assert others == {'a': None, 'b': {'c': 2, 'd': None}}
  assert optim.join(trained, others) == params


# --- layer-wise decay, LARS


def test_layer_decay_of_the_baselines():
  """The layers as MAE and SimMIM count them, of 12 blocks each."""
  for model, blocks, expected in (
    ('vit_base', 12, {
      'cls_token': 0, 'pos_embed': 0, 'patch_embed/proj/bias': 0, 'blocks/0/norm1/bias': 1,
      'blocks/11/norm1/bias': 12, 'fc_norm/bias': 13, 'head/bias': 13,
    }),
    ('swin_tiny', 12, {
      'patch_embed/norm/bias': 0,
      'layers/0/blocks/0/norm1/bias': 1, 'layers/0/blocks/1/norm1/bias': 2,
      'layers/0/downsample/norm/bias': 2, 'layers/1/blocks/0/norm1/bias': 3,
      'layers/2/blocks/5/norm1/bias': 10, 'layers/2/downsample/norm/bias': 10,
      'layers/3/blocks/1/norm1/bias': 12, 'norm/bias': 13, 'head/bias': 13,
    }),
  ):  # fmt: skip
    _, params = abstract_model(model)
    scales = torch_names.flatten(optim.layer_scales(params, 0.5))
    for name, layer in expected.items():
      assert scales[tuple(name.split('/'))] == 0.5 ** (blocks + 1 - layer), name


@pytest.mark.parametrize('optimizer', [optim.adamw, optim.lars])
def test_layers_of_a_hivit(optimizer):
  _, params = abstract_model('hivit_tiny', **TINY)
  own = ADAM if optimizer is optim.adamw else {'momentum': 0.9, 'weight_decay': 0.0}
  assert optimizer(params, rules=ClassifyTask.rules, **own).scales is None
  scales = optimizer(params, rules=ClassifyTask.rules, **own, layer_decay=0.5).scales
  # patch embedding, 2 + 2 stem blocks with a merge after each two, 2 main blocks, head
  assert scales['patch_embed']['proj']['kernel'] == 0.5**7
  numbers = [scales['blocks'][i]['norm2']['scale'] for i in (0, 1, 3, 4, 6, 7)]
  assert numbers == [0.5**6, 0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5]
  merges = [scales['blocks'][i]['reduction']['kernel'] for i in (2, 5)]
  assert merges == [0.5**5, 0.5**3]
  assert scales['head']['kernel'] == scales['fc_norm']['scale'] == 1


def test_merges_of_fast_itpn_are_layers_of_their_own():
  """By their place in `blocks`, as the authors' code counts; the config's optimizer does so."""
  config = finetune_hivit_t.get_config('debug')
  config.model.update(name='fast_itpn_tiny', num_classes=3)
  config.optim.layer_decay = 0.5
  _, params = abstract_model('fast_itpn_tiny', **TINY, num_classes=3)  # 1 + 1 + 2 blocks, 2 merges
  scales = assemble.optimizer(config)(params).scales
  assert scales['pos_embed'] == 0.5**7
  leaves = ('norm2', 'norm', 'norm2', 'norm', 'norm2', 'norm2')
  numbers = [scales['blocks'][i][leaf]['scale'] for i, leaf in enumerate(leaves)]
  assert numbers == [0.5**6, 0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5]


def test_layer_decay_of_an_encoder_inside_a_model_leaves_the_rest_alone():
  _, params = abstract_model('hivit_tiny', **TINY)
  whole = {'backbone': params, 'decode_head': {'blocks': [params['blocks'][0]]}}
  scales = optim.layer_scales(whole, 0.5, encoder='backbone/')
  assert scales['backbone'] == optim.layer_scales(params, 0.5)
  assert set(jax.tree.leaves(scales['decode_head'])) == {1.0}


def test_a_linear_probe_trains_the_last_layer_alone():
  _, params = abstract_model('hivit_tiny', **TINY, head_batch_norm=True)
  optimizer = optim.lars(params, rules=LinearTask.rules, momentum=0.9, weight_decay=0.0)
  trained = torch_names.flatten(optimizer.trained)
  assert {path for path, value in trained.items() if value} == {
    ('head', 'kernel'), ('head', 'bias'),
  }  # fmt: skip


def test_lars_by_hand():
  """MAE's: matrices get |p| / |update| / 1000, vectors none; momentum comes before the rate."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
  params = {'head': {'kernel': draw(4, 3), 'bias': draw(3)}}
  tx = optim.lars(params, rules=LinearTask.rules, momentum=0.9, weight_decay=0.1).tx
  state = tx.init(params)
  momenta = {'kernel': 0.0, 'bias': 0.0}
  for _ in range(3):
    gradients = {'head': {'kernel': draw(4, 3), 'bias': draw(3)}}
    updates, state = tx.update(gradients, state, params)
    for key, value in params['head'].items():
      update = gradients['head'][key]
      if key == 'kernel':
        update = update + 0.1 * value
        update = update * 0.001 * np.linalg.norm(value) / np.linalg.norm(update)
      momenta[key] = 0.9 * momenta[key] + update
      np.testing.assert_allclose(updates['head'][key], momenta[key], rtol=1e-5)
