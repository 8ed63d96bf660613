"""A state as few arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hivit_jax
from hivit_jax.train import optim, packing, sharding, step


def _tree(seed: float = 0.0) -> dict:
  """Vectors between other leaves, in containers of several kinds."""
  return {
    'blocks': [
      {'bias': jnp.arange(3.0) + seed, 'kernel': jnp.arange(6.0).reshape(2, 3) + seed},
      {'bias': jnp.arange(5.0) - seed, 'kernel': None},
    ],
    'count': jnp.asarray(7, jnp.int32),
    'indices': jnp.arange(4),
    'scale': jnp.full(2, 9.0 + seed),
  }


def _abstract(tree):
  place = sharding.replicated(sharding.make_mesh(1))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def test_vectors_lie_one_after_the_other():
  packed, _ = packing.pack(_tree())
  np.testing.assert_array_equal(packed['vectors'], [0, 1, 2, 0, 1, 2, 3, 4, 9, 9])
  matrices = packed['matrices']
  assert matrices['blocks'][0]['bias'] is matrices['scale'] is None
  assert matrices['indices'].shape == (4,)  # not float32: joined, it would change
  assert len(jax.tree.leaves(packed)) == 4


@pytest.mark.parametrize('convert', [lambda x: x, jax.device_get, _abstract])
def test_unpack_is_the_inverse(convert):
  tree = convert(_tree())
  result = packing.unpack(*packing.pack(tree))
  assert jax.tree.structure(result) == jax.tree.structure(tree)
  if convert is _abstract:
    assert result == tree
  else:
    jax.tree.map(np.testing.assert_array_equal, result, tree)


def test_a_tree_without_vectors():
  tree = {'kernel': jnp.ones((2, 2)), 'bias': None}
  packed, layout = packing.pack(tree)
  assert packed == {'matrices': tree, 'vectors': None}
  assert packing.unpack(packed, layout) == tree


def test_elementwise_is_a_map_with_all_vectors_at_once():
  seen = []

  def add(x, y):
    seen.append(x.shape)
    return x + 2 * y

  result = jax.jit(lambda *trees: packing.elementwise(add, *trees))(_tree(), _tree(1.0))
  jax.tree.map(
    np.testing.assert_array_equal, result, jax.tree.map(lambda x, y: x + 2 * y, _tree(), _tree(1.0))
  )
  assert sorted(seen) == [(), (2, 3), (4,), (10,)]


def test_a_state_is_a_mapping_and_one_list_of_arrays():
  state = packing.State({'step': jnp.asarray(3), 'params': _tree(), 'ema': _tree(1.0)})
  assert set(state) == {'step', 'params', 'ema'}
  assert 'ema' in state
  assert 'opt_state' not in state
  assert len(state) == 3
  assert len(jax.tree.leaves(state)) == 1 + 4 + 4
  assert state['step'] == 3
  jax.tree.map(np.testing.assert_array_equal, state['ema'], _tree(1.0))
  with pytest.raises(KeyError, match='average'):
    state['average']

  @jax.jit
  def double(state):
    return packing.State({**state, 'params': jax.tree.map(lambda x: 2 * x, state['params'])})

  doubled = double(state)
  assert jax.tree.structure(doubled) == jax.tree.structure(state)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), doubled['params'], _tree())
  jax.tree.map(np.testing.assert_array_equal, doubled['ema'], _tree(1.0))


def test_what_was_looked_up_survives_the_next_step():
  state = packing.State({'params': {'bias': jnp.arange(64.0), 'scale': jnp.ones(64)}})
  before = state['params']
  step_ = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  for _ in range(3):
    state = step_(state)
  np.testing.assert_array_equal(before['bias'], np.arange(64.0))
  np.testing.assert_array_equal(state['params']['bias'], np.arange(64.0) + 3)


def test_a_full_size_state_has_few_arrays():
  """For each the host takes its time to start a step."""
  adamw = lambda params: optim.adamw(  # noqa: E731
    params, rules=optim.PRETRAIN_RULES, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05
  )
  create = lambda: hivit_jax.create_model('mae_hivit_base')  # noqa: E731
  _, _, abstract = step.abstract_state(create, adamw, sharding.make_mesh(1))
  matrices = sum(x.ndim > 1 for x in jax.tree.leaves(abstract['params']))
  frozen = 1  # the decoder's position embedding has no moments
  numbers = 4  # the step, the optimizer's count, the vectors of the parameters and of the moments
  assert len(jax.tree.leaves(abstract)) == 3 * matrices - 2 * frozen + numbers < 400
