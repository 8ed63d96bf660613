"""What the optimizer does to which parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hivit_jax
from hivit_jax.interop import torch_names
from hivit_jax.train import optim
from tests.helpers import TINY, TINY_MAE, abstract_model

ADAM = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.0, 'clip_norm': None}
MODELS = [(name, {}) for name in hivit_jax.list_models() if 'large' not in name]
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
  return optim.adamw(params, rules=optim.PRETRAIN_RULES, **ADAM | options)


# --- rules


@pytest.mark.parametrize(('name', 'overrides'), MODELS)
def test_everything_but_vectors_decays(name, overrides):
  """As the official pretraining has it; the fixed position embedding is out of it."""
  _, params = abstract_model(name, **overrides)
  labels = torch_names.flatten(optim.apply_rules(optim.PRETRAIN_RULES, params))
  expected = {}
  for path, leaf in torch_names.flatten(params).items():
    expected[path] = 'decay' if leaf.ndim > 1 else 'no_decay'
  if name.startswith('mae'):
    expected['decoder_pos_embed',] = 'frozen'
  assert labels == expected


@pytest.mark.parametrize(
  'path',
  [('blocks', 0, 'gamma'), ('head', 'kernels'), ('head', 'unscale'), ('decoder_pos_embeds',)],
)
def test_a_parameter_without_a_rule_is_an_error(path):
  params = torch_names.unflatten({tuple(map(str, path)): np.zeros((2, 2))})
  with pytest.raises(ValueError, match=f'no rule .* "{"/".join(map(str, path))}"'):
    _adamw(params | {'mask_token': np.zeros((1, 1, 2))})


def test_the_first_rule_decides():
  rules = (('a/.*', 'first'), ('.*', 'second'))
  labels = optim.apply_rules(rules, {'a': {'b': 0}, 'c': {'a': 0}, 'aa': 0})
  assert labels == {'a': {'b': 'first'}, 'c': {'a': 'second'}, 'aa': 'second'}


# --- updates


def test_weight_decay_is_of_the_parameters_that_decay():
  params = _params()
  tx = _adamw(params, weight_decay=0.3)
  no_gradients = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(no_gradients, tx.init(params), params)
  flat, values = torch_names.flatten(updates), torch_names.flatten(params)
  for path, update in flat.items():
    decays = path in {('head', 'kernel'), ('mask_token',)}
    expected = 0.3 * values[path] if decays else jnp.zeros_like(update)
    np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))


def test_frozen_parameters_get_no_update_and_have_no_state():
  params = _params()
  tx = _adamw(params, weight_decay=0.3, clip_norm=1.0)
  state = tx.init(params)
  gradients = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
  updates, state = tx.update(gradients, state, params)
  assert (updates.pop('decoder_pos_embed') == 0).all()
  assert all((leaf != 0).all() for leaf in jax.tree.leaves(updates))

  names = {optim.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
  assert any('mask_token' in name for name in names)
  assert not any('decoder_pos_embed' in name for name in names)
  trained = sum(leaf.size for leaf in jax.tree.leaves(params)) - params['decoder_pos_embed'].size
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * trained + 1  # and a counter


def _first_moment(state):
  is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
  (adam,) = (node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node))
  return adam.mu


def test_gradients_are_clipped_to_their_global_norm():
  params = _params()
  gradients = {**jax.tree.map(jnp.ones_like, params)}
  gradients['decoder_pos_embed'] = jnp.zeros_like(params['decoder_pos_embed'])
  norm = float(optax.tree.norm(gradients))
  moments = {}
  for clip in (None, norm / 4, norm * 4):
    tx = _adamw(params, clip_norm=clip)
    moments[clip] = _first_moment(tx.update(gradients, tx.init(params), params)[1])
    expected = norm if clip is None else min(norm, clip)
    np.testing.assert_allclose(optax.tree.norm(moments[clip]), 0.1 * expected, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, moments[None], moments[norm * 4])


def test_a_run_can_go_on_with_another_clipping():
  params = _params()
  states = [_adamw(params, clip_norm=clip).init(params) for clip in (None, 1.0)]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
