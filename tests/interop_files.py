"""PyTorch files in the containers that exist, from golden parameters."""

import argparse
import sys
import types
from pathlib import Path

import numpy as np

from tests.helpers import load_golden

# Arguments that shapes do not tell, for the golden models.
HEADS = {'num_heads': 4}


def golden_state(name: str) -> dict[str, np.ndarray]:
  """The PyTorch state dict of a golden file, buffers too."""
  _, arrays = load_golden(f'{name}.npz')
  return {k.removeprefix('param/'): v for k, v in arrays.items() if k.startswith('param/')}


def tensors(state: dict[str, np.ndarray], prefix: str = '') -> dict:
  import torch

  return {prefix + name: torch.from_numpy(value.copy()) for name, value in state.items()}


def save(path: Path, content) -> Path:
  import torch

  torch.save(content, path)
  return path


def cfg_node(**settings):
  """An instance of `yacs.config.CfgNode` as pickle sees it, without yacs."""
  if 'yacs' not in sys.modules:
    config = types.ModuleType('yacs.config')
    config.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    sys.modules |= {'yacs': types.ModuleType('yacs'), 'yacs.config': config}
  node = sys.modules['yacs.config'].CfgNode(settings)
  node.__dict__['__immutable__'] = True
  return node


def forget_yacs() -> None:
  for name in ('yacs', 'yacs.config'):
    sys.modules.pop(name, None)


def official(state: dict[str, np.ndarray], prefix: str = '') -> dict:
  """A self-supervised checkpoint as the official code writes it."""
  return {
    'model': tensors(state, prefix),
    'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3, 'betas': (0.9, 0.95)}]},
    'epoch': 799,
    'scaler': {'scale': 65536.0, '_growth_tracker': 3},
    'args': argparse.Namespace(batch_size=64, model='mae_hivit', lr=None),
  }
