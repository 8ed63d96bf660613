"""Names and layouts: parameters here against PyTorch state dicts.

Modules carry the PyTorch names, so only the last part of a name and the layout of kernels differ:

    kernel of a Linear (in, out)       <-> weight (out, in)
    kernel of a Conv   (h, w, in, out) <-> weight (out, in, h, w)
    scale of a LayerNorm               <-> weight
    mean, var of a BatchNorm           <-> running_mean, running_var
    everything else                    <-> the same name and layout
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]

_LEAVES = {'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}


def flatten(params: Mapping, prefix: Path = ()) -> dict[Path, np.ndarray]:
  """Nested dict -> {path: leaf}, path parts as strings."""
  flat = {}
  for key, value in params.items():
    path = (*prefix, str(key))
    flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
  return flat


def unflatten(flat: Mapping[Path, Any]) -> dict:
  """Inverse of `flatten`; all-digit parts become integers, as `flax.nnx.to_pure_dict` has them."""
  nested: dict = {}
  for path, value in flat.items():
    *parents, leaf = (int(part) if part.isdigit() else part for part in path)
    node = nested
    for part in parents:
      node = node.setdefault(part, {})
    node[leaf] = value
  return nested


def to_torch(path: Path, value: np.ndarray) -> tuple[str, np.ndarray]:
  """One parameter here -> its name and value in a PyTorch state dict."""
  *module, leaf = path
  if leaf == 'kernel':
    axes = (3, 2, 0, 1) if value.ndim == 4 else (1, 0)
    return '.'.join((*module, 'weight')), np.transpose(value, axes)
  return '.'.join((*module, _LEAVES.get(leaf, leaf))), value


def from_torch(path: Path, value: np.ndarray) -> np.ndarray:
  """Value in the PyTorch layout -> the layout of the parameter at `path` here."""
  if path[-1] == 'kernel':
    return np.transpose(value, (2, 3, 1, 0) if value.ndim == 4 else (1, 0))
  return value
