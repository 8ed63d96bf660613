"""What tools for images compute with is what the run computed with."""

import jax.numpy as jnp
from flax import nnx

from hivit_jax.interop import carried, exporter, files
from hivit_jax.ops.choice import ATTENTION, PLAIN
from hivit_jax.tools import loaded
from hivit_jax.train import assemble
from tests.helpers import TINY_VIT, random_model


def test_operations_and_attention_are_those_of_the_config(monkeypatch):
  model = nnx.merge(*random_model('vit_base', **TINY_VIT, num_classes=3))
  config = {
    'image_size': (32, 32), 'channels': 3, 'seed': 0,
    'model': {'name': 'vit_base', 'dtype': 'bfloat16', 'attention': 'auto', 'ops': 'plain'}
    | {k: v for k, v in TINY_VIT.items() if k != 'image_size'} | {'num_classes': 3},
  }  # fmt: skip
  state = files.StateDict(exporter.state_dict(model), 'FILE', {'config': config})
  read = loaded.model(state, carried.model_of(state))
  assert read.ops == PLAIN
  assert read.settings.dtype == jnp.bfloat16
  config['model'].pop('ops')  # as older runs
  monkeypatch.setattr(assemble, 'attention', lambda config: config.model.attention)  # of a GPU
  assert loaded.model(state, carried.model_of(state)).ops.attend is ATTENTION['auto']
