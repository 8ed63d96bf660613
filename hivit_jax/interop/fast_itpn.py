"""Fast-iTPN's parameters: as its code has them, and joined, as the model here has them.

attn.{q,k,v}_proj.weight, attn.{q,v}_bias  <-> attn.qkv.weight, attn.qkv.bias, zero for the keys
mlp.fc{1,2}.weight (out, in, 1, 1)         <-> (out, in)
reduction.weight (out, c, 2, 2)            <-> (out, 4 c), neighbours in the order of a merge
"""

import re
from collections.abc import Mapping

import numpy as np

_MERGE = r'(blocks\.\d+\.)?reduction\.weight'
_STEM = r'blocks\.\d+\.mlp\.fc[12]\.weight'
_QUERY = 'attn.q_proj.weight'


def is_fast_itpn(names: Mapping) -> bool:
  """Whether names are Fast-iTPN's, joined or not: a `pos_embed` and merges has nothing else."""
  return 'pos_embed' in names and any(re.fullmatch(_MERGE, name) for name in names)


def joined(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The names and layouts of the model here; what is joined already, or not Fast-iTPN's, stays."""
  result = dict(arrays)
  if not is_fast_itpn(arrays):
    return result
  for name, value in arrays.items():
    if value.ndim == 4 and re.fullmatch(_STEM, name):
      result[name] = value.reshape(value.shape[:2])
    elif value.ndim == 4 and re.fullmatch(_MERGE, name):
      result[name] = value.transpose(0, 3, 2, 1).reshape(len(value), -1)
    elif name.endswith(_QUERY):
      _join(result, name.removesuffix(_QUERY) + 'attn.')
  return result


def _join(arrays: dict[str, np.ndarray], attention: str) -> None:
  weights = [f'{attention}{part}_proj.weight' for part in 'qkv']
  query, value = (f'{attention}{part}_bias' for part in 'qv')
  if not {*weights, query, value} <= arrays.keys():
    return  # the importer says what is missing
  arrays[f'{attention}qkv.weight'] = np.concatenate([arrays.pop(name) for name in weights])
  parts = [arrays.pop(query), arrays.pop(value)]
  parts.insert(1, np.zeros_like(parts[0]))
  arrays[f'{attention}qkv.bias'] = np.concatenate(parts)


def split(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Inverse of `joined`; the bias of the keys, which changes nothing, is left out."""
  result = {}
  for name, value in arrays.items():
    attention = re.fullmatch(r'(.*attn\.)qkv\.(weight|bias)', name)
    if attention:
      query, key, of_values = np.split(value, 3)
      if attention[2] == 'weight':
        parts = {'q_proj.weight': query, 'k_proj.weight': key, 'v_proj.weight': of_values}
      else:
        parts = {'q_bias': query, 'v_bias': of_values}
      result |= {attention[1] + part: x for part, x in parts.items()}
    elif value.ndim == 2 and re.fullmatch(_STEM, name):
      result[name] = value[:, :, None, None]
    elif value.ndim == 2 and re.fullmatch(_MERGE, name):
      result[name] = value.reshape(len(value), 2, 2, -1).transpose(0, 3, 2, 1)
    else:
      result[name] = value
  return result
