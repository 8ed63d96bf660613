"""How training steps add up: in float32 whatever they compute in, and in a fixed order."""

import collections
import importlib
import re

import jax
import jax.numpy as jnp
import pytest

from hivit_jax.train import assemble, sharding

pytestmark = pytest.mark.slow

# Every kind of model, by a config that trains it.
CONFIGS = {
  'mae_hivit': ('mae_hivit_b', {}),
  'mae_hivit_rpe': ('mae_hivit_b', {'rpe': True}),  # with bias tables and dropped units
  'mae_vit': ('mae_vit_b', {}),
  'simmim_swin': ('simmim_swin_b', {}),
  'hivit': ('finetune_hivit_b', {}),
  'vit': ('finetune_vit_b', {}),
  'swin': ('finetune_swin_b', {}),
}
BATCH = 40  # no activation then has the shape of a weight


@pytest.fixture(scope='module', params=CONFIGS)
def step(request) -> tuple[str, dict]:
  """A bfloat16 training step lowered for NVIDIA GPUs, and the shapes of the parameters."""
  name, model = CONFIGS[request.param]
  config = importlib.import_module(f'configs.{name}').get_config('debug')
  config.model.update(model, dtype='bfloat16')
  training = assemble.training(config, sharding.make_mesh())
  batch = {
    'image': jax.ShapeDtypeStruct((BATCH, *assemble.image_size(config), 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct((BATCH,), jnp.int32),
  }
  traced = training.train_step.trace(training.abstract, batch)
  return traced.lower(lowering_platforms=('cuda',)).as_text(), training.abstract['params']


def test_gradients_of_weights_are_float32_products(step):
  """XLA's CPU backend widens sums over devices anyway, so only the lowered program tells."""
  text, params = step
  weights = collections.Counter(
    f'{leaf.size // leaf.shape[-1]}x{leaf.shape[-1]}'
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == 'kernel'
  )
  products = collections.Counter(
    (shape, dtype)
    for shape, dtype in re.findall(r'stablehlo\.dot_general .*-> tensor<([\dx]+)x(\w+)>', text)
    if shape in weights
  )
  assert products == {(shape, 'f32'): count for shape, count in weights.items()}


def test_nothing_is_added_up_in_bfloat16(step):
  sums = re.findall(r'stablehlo\.reduce\(.* applies stablehlo\.add .*-> (tensor<.*>)', step[0])
  assert sums
  assert [kind for kind in sums if 'bf16' in kind] == []


def test_nothing_is_scattered(step):
  """GPUs add what goes to one place in any order: runs would not repeat to the bit."""
  assert 'stablehlo.scatter' not in step[0]
