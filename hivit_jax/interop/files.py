"""State dicts in files: their names, their wrappers, and how they are written."""

import contextlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hivit_jax.errors import UserError
from hivit_jax.interop import fast_itpn

_SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')
_WRAPPED = ('model', 'state_dict', 'module', 'net')  # DeepSpeed's is the third, trackers' the last
_WRAPPED_EMA = ('model_ema', 'state_dict_ema', 'ema_state_dict')
# `model.` is Lightning's, `encoder.body.` that of trackers.
_PREFIXES = ('module.', 'backbone.', 'encoder.', 'body.', 'model.')
# Trackers split HiViT's position embedding into that of the search region and pos_embed_z, that of
# the template.
_SEARCH = 'pos_embed_x'
_METADATA_KEY = 'hivit_jax'

# Names of other code -> the official ones. Only for files with HiViT's patch embedding.
_RENAMED = (
  (r'pos_embed', 'absolute_pos_embed'),  # mmpretrain
  (r'head\.fc\.(weight|bias)', r'head.\1'),  # mmpretrain
  (r'head\.0\.(running_mean|running_var|num_batches_tracked)', r'head_norm.\1'),  # linear probes
  (r'head\.1\.(weight|bias)', r'head.\1'),
)


class StateDict(NamedTuple):
  """A PyTorch state dict.

  Attributes:
    arrays: name -> array in PyTorch's layout, with the names of the models here.
    source: where it comes from, for messages.
    metadata: what `write` was given, or {}.
  """

  arrays: dict[str, np.ndarray]
  source: str
  metadata: dict[str, Any]


def is_weight_file(path: str | os.PathLike[str]) -> bool:
  """Whether the name is that of a PyTorch or safetensors file."""
  return pathlib.Path(path).suffix in _SUFFIXES


def read(path: str | os.PathLike[str], *, ema: bool = False) -> StateDict:
  """Reads a `.pth` or `.safetensors` file.

  Args:
    path: of the file.
    ema: take the exponential moving average of the weights, which some files have besides them.

  Raises:
    UserError: the file is missing, damaged, unsafe, or holds no state dict.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f'{path} does not exist' if not path.exists() else f'{path} is not a file')
  if path.suffix == '.safetensors':
    content, metadata = _read_safetensors(path)
  else:
    from hivit_jax.interop import torch_io

    content = torch_io.read(path)
    metadata = _metadata_in(content, path)
  return StateDict(normal_names(_unwrap(content, path, ema)), str(path), metadata)


def write(
  path: str | os.PathLike[str],
  arrays: Mapping[str, np.ndarray],
  *,
  wrapped_in: str | None = None,
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes a state dict; the file appears under its name when it is complete.

  Args:
    path: ends in `.pth`, `.pt`, `.bin` or `.safetensors`.
    arrays: name -> array in PyTorch's layout.
    wrapped_in: the key under which PyTorch files have the state dict; safetensors are always bare.
    metadata: for JSON; `read` returns it. Bare PyTorch files have no place for it.
  """
  path = pathlib.Path(path)
  if path.suffix not in _SUFFIXES:
    raise UserError(f'{path}: the name must end in one of {", ".join(_SUFFIXES)}')
  arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
  text = json.dumps(metadata or {})
  partial = path.with_name(f'.{path.name}.writing')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    mode = partial.stat().st_mode  # as the umask has it; safetensors writes 0600
    if path.suffix == '.safetensors':
      from safetensors.numpy import save_file

      save_file(arrays, partial, metadata={'format': 'pt', _METADATA_KEY: text})
    else:
      from hivit_jax.interop import torch_io

      torch_io.write(partial, {wrapped_in: arrays, _METADATA_KEY: text} if wrapped_in else arrays)
    partial.chmod(stat.S_IMODE(mode))
    partial.rename(path)
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror or error}') from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def normal_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Removes the prefixes of wrappers and gives parameters the names of the models here.

  Raises:
    UserError: two names become one.
  """
  names = {name: name for name in arrays}
  stripped = True
  while stripped:
    stripped = False
    for prefix in _PREFIXES:
      for name, short in names.items():
        if short.startswith(prefix):
          names[name], stripped = short.removeprefix(prefix), True
  if 'patch_embed.norm.weight' in names.values():
    for pattern, replacement in _RENAMED:
      for name, short in names.items():
        names[name] = re.sub(f'^{pattern}$', replacement, short)
  if _SEARCH in names.values() and 'absolute_pos_embed' not in names.values():
    names = {k: 'absolute_pos_embed' if short == _SEARCH else short for k, short in names.items()}
  result: dict[str, np.ndarray] = {}
  for name, short in names.items():
    if short in result:
      raise UserError(f'{short} appears twice under different prefixes, the second time as {name}')
    result[short] = arrays[name]
  return fast_itpn.joined(result)


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  import ml_dtypes  # noqa: F401  (makes numpy know bfloat16)
  import safetensors

  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = (file.metadata() or {}).get(_METADATA_KEY, '{}')
      return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata)  # noqa: SIM118
  except (safetensors.SafetensorError, ValueError, TypeError) as error:
    raise UserError(
      f'{path} is not a safetensors file, or is damaged (an incomplete download?): {error}'
    ) from None
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror or error}') from error


def _metadata_in(content: Any, path: pathlib.Path) -> dict[str, Any]:
  """What `write` left in a PyTorch file beside its state dict; of OpenMMLab's, the classes."""
  text = content.get(_METADATA_KEY) if isinstance(content, dict) else None
  if not isinstance(text, str):
    meta = content.get('meta') if isinstance(content, dict) else None
    classes = meta.get('CLASSES') if isinstance(meta, dict) else None
    if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
      return {'class_names': list(classes)}
    return {}
  try:
    return json.loads(text)
  except ValueError as error:
    raise UserError(f'{path} is damaged: its "{_METADATA_KEY}" is not JSON: {error}') from None


def not_finite(arrays: Mapping[str, np.ndarray]) -> list[str]:
  """Names of the arrays that hold NaN or infinite numbers."""
  return [
    name
    for name, value in arrays.items()
    if value.dtype.kind in 'fV' and not np.isfinite(value).all()  # V: bfloat16
  ]


def _unwrap(content: Any, path: pathlib.Path, ema: bool) -> dict[str, np.ndarray]:
  """Finds the state dict in what a file contains."""
  if not isinstance(content, dict):
    raise UserError(f'{path} holds a {type(content).__name__}, not the weights of a model')
  wanted, other = (_WRAPPED_EMA, _WRAPPED) if ema else (_WRAPPED, _WRAPPED_EMA)
  for key in wanted:
    if isinstance(content.get(key), dict):
      return _arrays(content[key], f'"{key}" in {path}')
  there = ', '.join(map(str, list(content)[:8])) or 'nothing'
  if ema:
    raise UserError(f'{path} has no averaged weights ({", ".join(wanted)}); it has: {there}')
  for key in other:
    if isinstance(content.get(key), dict):
      raise UserError(f'{path} has only averaged weights ("{key}"); ask for them: ema=True, --ema')
  return _arrays(content, str(path))


def _arrays(content: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
  strange = [key for key, value in content.items() if not isinstance(value, np.ndarray)]
  if strange or not content:
    shown = ', '.join(map(str, strange[:5]))
    raise UserError(
      f'{where} is not a state dict: '
      + (f'{shown} {"is" if len(strange) == 1 else "are"} no tensor' if content else 'it is empty')
    )
  return {str(key): value for key, value in content.items()}
