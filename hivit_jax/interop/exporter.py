"""State dicts that load into PyTorch code with `strict=True`."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.interop import (
  detector,
  fast_itpn,
  files,
  importer,
  infer,
  mismatch,
  segmenter,
  torch_names,
)
from hivit_jax.interop.files import StateDict, normal_names
from hivit_jax.interop.infer import Described
from hivit_jax.models import swin, targets
from hivit_jax.ops import relative_position
from hivit_jax.ops.modules import BATCH_NORM_EPS

# Layout -> (what it is, the key under which a .pth file has the state dict)
LAYOUTS = {
  'official': ('the official classifier', 'model'),
  'mae': ('the official masked autoencoder with its decoder', 'model'),
  'simmim': ('the official SimMIM with its decoder', 'model'),
  'segmenter': ("mmsegmentation's segmenter with its heads", 'state_dict'),
  'detector': ("mmdetection's detector with its heads", 'state_dict'),
  'backbone': ('the official detection and segmentation backbone', 'state_dict'),
  'mmpretrain': ("mmpretrain's HiViT classifier, without its final norm", 'state_dict'),
}
_NEEDED = {
  'official': 'classifier',
  'mmpretrain': 'classifier',
  'mae': 'mae',
  'simmim': 'simmim',
  'segmenter': 'segmenter',
  'detector': 'detector',
}
_log = logging.getLogger(__name__)
_TABLE, _INDEX, _MASK = 'relative_position_bias_table', 'relative_position_index', 'attn_mask'


def named_arrays(params: Mapping) -> dict[str, np.ndarray]:
  """A pure dict of parameters -> names and layouts as in `files.StateDict`; kernels are views."""
  flat = torch_names.flatten(params)
  return normal_names(
    dict(torch_names.to_torch(path, np.asarray(value)) for path, value in flat.items())
  )


def default_layout(state: StateDict) -> str:
  """The layout for a kind of model."""
  kind = infer.family(state.arrays)
  return 'official' if kind == 'classifier' else kind


def state_dict(
  model: Any, layout: str | None = None, *, prefix: str | None = None
) -> dict[str, np.ndarray]:
  """A model's parameters for PyTorch.

  Args:
    model: from `create_model`.
    layout: one of `LAYOUTS`; None: the one for this kind of model.
    prefix: instead of the layout's, such as '' for a bare backbone.
  """
  arrays = named_arrays(nnx.to_pure_dict(nnx.state(model)))
  metadata = {'image_size': model.image_size, 'target': getattr(model, 'predicts', None)}
  state = StateDict(arrays, 'the model', metadata)
  return in_layout(state, layout, prefix=prefix)


def in_layout(
  state: StateDict, layout: str | None = None, *, prefix: str | None = None
) -> dict[str, np.ndarray]:
  """Names as in `files.StateDict` -> the names, buffers and prefixes of a layout.

  Args:
    state: all parameters of a model.
    layout: one of `LAYOUTS`; None: the one for this kind of model.
    prefix: instead of the layout's.

  Raises:
    UserError: the model lacks what the layout needs.
  """
  kind = infer.family(state.arrays)
  layout = layout or default_layout(state)
  if layout not in LAYOUTS:
    raise UserError(f'layout "{layout}" is unknown; there are: {", ".join(LAYOUTS)}')
  base = infer.architecture(state.arrays)
  if _NEEDED.get(layout, kind) != kind or (layout == 'mmpretrain' and base != 'hivit'):
    fitting = default_layout(state)
    encoder = '' if kind == 'backbone' else ', or --layout=backbone for the encoder'
    raise UserError(
      f'{state.source} is {infer.KINDS[kind][0]}, and layout "{layout}" is {LAYOUTS[layout][0]}: '
      f'use --layout={fitting}{encoder}'
    )
  arrays = _parameters(state)
  if layout == 'backbone':
    own = r'norm\..*' if base in ('vit', 'swin') else rf'fpn\d.*|{mismatch.PYRAMID}'
    encoder = f'{mismatch.ENCODER}|{own}'
    arrays = {name: value for name, value in arrays.items() if re.fullmatch(encoder, name)}
    prefix = 'backbone.' if prefix is None else prefix
  if layout == 'mae' and base == 'hivit' and 'norm.weight' not in arrays:
    # In every official MAE, but without hifeat never applied: what it starts as.
    width = arrays['absolute_pos_embed'].shape[2]
    arrays |= {'norm.weight': np.ones(width, np.float32), 'norm.bias': np.zeros(width, np.float32)}
  if layout == 'mae' and state.metadata.get('target') == targets.SARATRX:
    arrays |= _saratrx_masks()
  arrays = _official(arrays, state, every_block=layout == 'mmpretrain')
  if layout == 'segmenter':
    return _openmmlab(arrays, segmenter.HEADS)
  if layout == 'detector':
    if detector.CASCADE in arrays:
      _log.warning("mmdetection's cascade has a mask head per stage and does not load this one")
    return _openmmlab(arrays, detector.HEADS)
  if layout == 'mmpretrain':
    return _mmpretrain(arrays)
  if layout == 'simmim':
    arrays = {k if k.startswith('decoder.') else f'encoder.{k}': v for k, v in arrays.items()}
  return {f'{prefix or ""}{name}': value for name, value in arrays.items()}


def in_layout_described(
  state: StateDict, described: Described, arrays: Mapping[str, np.ndarray], layout: str
) -> Described:
  """The model of `arrays`, which `in_layout` made of a state dict of the model `described`."""
  arguments = dict(described.arguments)
  if layout == 'backbone' and described.name.startswith('backbone_'):
    return described
  if layout == 'backbone':
    kept = {key: arguments[key] for key in ('num_heads', 'image_size')}
    if 'position_image_size' in arguments:  # `image_size` is another one
      kept['image_size'] = arguments['position_image_size']
    arrays = files.normal_names(arrays)
    backbone = infer.describe(arrays, state.source, **kept)
    if mismatch.has_pyramid(arrays):
      backbone = infer.with_pyramid(backbone, arrays, state.source)
    guessed = tuple(key for key in described.guessed if key in kept)
    return backbone._replace(guessed=guessed)
  if arguments.get('head_batch_norm'):  # is part of the last layer now
    arguments['head_batch_norm'] = False
  return described._replace(arguments=arguments)


def whole(state: StateDict, described: Described) -> tuple[dict[str, np.ndarray], Described]:
  """All of a model in the layout for its kind, without a prefix, and the model that this is.

  Args:
    state: all parameters of a model.
    described: the model.
  """
  if infer.family(state.arrays) == 'backbone':  # a classifier without a head keeps its norm
    return _official(_parameters(state), state), described
  layout = default_layout(state)
  arrays = in_layout(state, layout, prefix='')
  return arrays, in_layout_described(state, described, arrays, layout)


def _parameters(state: StateDict) -> dict[str, np.ndarray]:
  """A state dict without buffers and without the BatchNorm of a linear probe."""
  return _without_batch_norm(
    {name: value for name, value in state.arrays.items() if not name.endswith((_INDEX, _MASK))}
  )


def _official(
  arrays: dict[str, np.ndarray], state: StateDict, every_block: bool = False
) -> dict[str, np.ndarray]:
  """Parameters as the official code has them, with its buffers."""
  base = infer.architecture(state.arrays)
  if base == 'fast_itpn':
    return fast_itpn.split(arrays)
  if base == 'swin':
    return arrays | _swin_buffers(arrays, state)
  return arrays | _indices(arrays, state, every_block)


def _without_batch_norm(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Makes a linear probe a plain classifier: its BatchNorm becomes part of the last layer."""
  arrays = dict(arrays)
  if 'head_norm.running_mean' in arrays:
    mean = np.asarray(arrays.pop('head_norm.running_mean'), np.float64)
    scale = 1 / np.sqrt(arrays.pop('head_norm.running_var') + np.float64(BATCH_NORM_EPS))
    weight = np.asarray(arrays['head.weight'], np.float64) * scale
    bias = arrays['head.bias'] - weight @ mean
    arrays |= {'head.weight': weight.astype(np.float32), 'head.bias': bias.astype(np.float32)}
  return arrays


def _indices(
  arrays: Mapping[str, np.ndarray], state: StateDict, every_block: bool
) -> dict[str, np.ndarray]:
  """The index buffers that go with relative position bias tables."""
  tables = [name for name in arrays if name.endswith(_TABLE)]
  if not tables:
    return {}
  size = infer.image_size(state.metadata)
  hint = None if size is None else (size[0] // 16, size[1] // 16)
  grid = importer.bias_grid(len(arrays[tables[0]]), hint)
  if grid is None:
    raise UserError(f'{state.source}: give its image size, --image_size=HEIGHTxWIDTH')
  index = _index(grid)
  names = [_INDEX]
  if every_block:
    names += [f'{name.rpartition(".")[0]}.{_INDEX}' for name in tables]
  return {name: np.array(index) for name in names}  # safetensors refuses shared memory


def _saratrx_masks() -> dict[str, np.ndarray]:
  """Constants of SARATR-X: the halves of its windows, left, right, above and below."""
  result = {}
  for i, radius in enumerate(targets.RADII, 1):
    left = np.zeros((1, 1, 2 * radius + 1, 2 * radius + 1), np.float32)
    left[..., : radius + 1] = 1
    above = left.swapaxes(2, 3)
    halves = {'x1': left, 'x2': left[..., ::-1], 'y1': above, 'y2': above[:, :, ::-1]}
    result |= {f'sarfeature{i}.weight_{k}': np.ascontiguousarray(v) for k, v in halves.items()}
  return result


def _swin_buffers(arrays: Mapping[str, np.ndarray], state: StateDict) -> dict[str, np.ndarray]:
  """Every block's index, and the masks of those that shift their windows."""
  described = infer.describe(state.arrays, state.source, **infer.known_size(state.metadata))
  height, width = described.arguments['image_size']
  result = {}
  for name in (name for name in arrays if name.endswith(_TABLE)):
    _, stage, _, block, *_ = name.split('.')
    scale = swin.PATCH << int(stage)
    grid = height // scale, width // scale
    side = (math.isqrt(len(arrays[name])) + 1) // 2
    result[name.replace(_TABLE, _INDEX)] = _index((side, side))
    if int(block) % 2 and min(grid) > side:
      mask = swin.shift_mask(grid, side, side // 2)
      result[f'layers.{stage}.blocks.{block}.{_MASK}'] = mask.copy()
  return result


def _index(grid: tuple[int, int]) -> np.ndarray:
  return np.asarray(relative_position.index(np.arange(grid[0] * grid[1]), grid), dtype=np.int64)


def _openmmlab(arrays: Mapping[str, np.ndarray], heads: tuple[str, ...]) -> dict[str, np.ndarray]:
  """The encoder's names as a backbone's, and the counters of BatchNorms, at zero."""
  named = {}
  for name, value in arrays.items():
    named[name if name.startswith(heads) else f'backbone.{name}'] = value
    if name.endswith('.running_var'):
      named[name.replace('running_var', 'num_batches_tracked')] = np.zeros((), np.int64)
  return named


def _mmpretrain(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  result = {}
  for name, value in arrays.items():
    if name.startswith('head.'):
      result[name.replace('head.', 'head.fc.')] = value
    elif not name.startswith('fc_norm.'):
      result['backbone.' + name.replace('absolute_pos_embed', 'pos_embed')] = value
  return result
