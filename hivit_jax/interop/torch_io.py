"""PyTorch files: the only module that imports PyTorch, and only when a function is called.

A `.pth` file is a pickle, which can run any code. Here nothing of it is run: PyTorch's restricted
reader knows tensors and plain containers, and besides them only the two inert names below.
"""

import argparse
import collections
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

from hivit_jax.errors import UserError

_INSTALL = 'pip install torch --index-url https://download.pytorch.org/whl/cpu'


def read(path: str | os.PathLike[str]) -> Any:
  """Reads a `.pth` file: nested dicts and lists with numpy arrays instead of tensors.

  Nothing in the file is executed. Tensors are mapped from the file, not copied, where its format
  allows; half precision becomes float32.

  Raises:
    UserError: the file is not there, is not a checkpoint, is damaged, or wants to run code.
  """
  torch = _torch(path)
  allowed = [
    argparse.Namespace,  # `args` in the official files
    # `config` in the supervised ones; the class itself is never looked for.
    (collections.OrderedDict, 'yacs.config.CfgNode'),
  ]
  try:
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
      warnings.simplefilter('ignore')  # about what old files contain
      # Only the zip format of PyTorch 1.6 and later can be mapped.
      mapped = zipfile.is_zipfile(path)
      content = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
    return _to_numpy(torch, content)
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror or error}') from error
  except Exception as error:  # a damaged file makes the reader stumble in any way
    raise _explain(path, error) from None


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
  """Writes nested dicts of numpy arrays and strings as a `.pth` file of tensors and strings."""
  torch = _torch(path)

  def tensors(value):
    if isinstance(value, Mapping):
      return {key: tensors(item) for key, item in value.items()}
    if isinstance(value, str):
      return value
    # PyTorch warns about arrays that it must not write to; saving only reads.
    return torch.from_numpy(value if value.flags.writeable else value.copy())

  torch.save(tensors(content), path)


def _torch(path: Any) -> Any:
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f'{path}: .pth files need PyTorch, which is not installed: {_INSTALL} '
      '(.safetensors files do not need it)'
    ) from error
  return torch


def _to_numpy(torch: Any, value: Any) -> Any:
  if isinstance(value, torch.Tensor):
    value = value.detach()
    if value.dtype in (torch.float16, torch.bfloat16):
      value = value.float()
    return value.numpy()
  if isinstance(value, Mapping):
    return {key: _to_numpy(torch, item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_to_numpy(torch, item) for item in value]
  return value


def _explain(path: Any, error: Exception) -> UserError:
  text = str(error)
  wanted = re.search(r'GLOBAL ([\w.]+)|function (<[^>]+>|[\w.]+)|but got (<class [^>]+>)', text)
  if isinstance(error, pickle.UnpicklingError) and wanted:
    name = next(group for group in wanted.groups() if group)
    return UserError(
      f'{path} was not loaded: it wants to run {name}, and nothing in a weight file may run. '
      'Ask its author for the bare state dict (torch.save(model.state_dict(), ...)) or for '
      '.safetensors'
    )
  return UserError(
    f'{path} is not a PyTorch checkpoint, or is damaged (an incomplete download?): '
    f'{text.splitlines()[0][:120] if text else type(error).__name__}'
  )
