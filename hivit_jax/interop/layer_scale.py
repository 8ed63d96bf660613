"""The scales of residual branches (LayerScale), made part of the products before them."""

import re
from collections.abc import Mapping

import numpy as np

from hivit_jax.errors import UserError
from hivit_jax.interop.files import StateDict

# Scale -> the last product of its branch.
_LAST = {'gamma_1': ('attn.proj',), 'gamma_2': ('mlp.fc2', 'mlp.w3')}
_GAMMA = r'(.*)(gamma_[12])'


def has(names: Mapping) -> bool:
  """Whether any residual branch has a scale."""
  return any(re.fullmatch(_GAMMA, name) for name in names)


def folded(state: StateDict) -> StateDict:
  """Weights that compute the same, but for rounding, without scales.

  For inference: trained on, they are another model than the published one.

  Raises:
    UserError: there are no scales.
  """
  if not has(state.arrays):
    raise UserError(f'{state.source} has no scales to fold: leave out fold_layer_scale')
  arrays = dict(state.arrays)
  for name, gamma in state.arrays.items():
    if match := re.fullmatch(_GAMMA, name):
      products = [p for p in _LAST[match[2]] if f'{match[1]}{p}.weight' in arrays]
      if len(products) != 1 or f'{match[1]}{products[0]}.bias' not in arrays:
        raise UserError(f'{state.source}: there is no product with a bias to fold {name} into')
      (last,) = products
      gamma = np.asarray(gamma, np.float32)
      del arrays[name]
      for leaf, scale in (('weight', gamma[:, None]), ('bias', gamma)):
        key = f'{match[1]}{last}.{leaf}'
        arrays[key] = np.asarray(arrays[key], np.float32) * scale
  return state._replace(arrays=arrays, metadata=_without(state.metadata))


def _without(metadata: Mapping) -> dict:
  """Metadata whose model has no scales; in a config, None would be the model's default."""
  result = dict(metadata)
  if 'model' in result:
    model = result['model']
    arguments = {**model.get('arguments', {}), 'layer_scale': 0.0}
    result['model'] = {**model, 'arguments': arguments}
  elif 'config' in result:
    config = result['config']
    result['config'] = {**config, 'model': {**config.get('model', {}), 'layer_scale': 0.0}}
  return result
