"""Which model a state dict belongs to, told from its names and shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hivit_jax.errors import UserError
from hivit_jax.models import MODELS

_HEAD_WIDTH = 64  # channels of an attention head in every published HiViT
_PRETRAINED_DECODER_HEADS = 16
_FAMILIES = {'classifier': 'hivit', 'mae': 'mae_hivit', 'backbone': 'backbone_hivit'}


class Described(NamedTuple):
  """`create_model(name, **arguments)` has the parameters of the state dict."""

  name: str
  arguments: dict[str, Any]


def family(arrays: Mapping[str, Any]) -> str:
  """'mae', 'classifier' or 'backbone'."""
  if 'decoder_pred.weight' in arrays and 'decoder_embed.weight' in arrays:
    return 'mae'
  return 'classifier' if 'head.weight' in arrays else 'backbone'


def hints(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments for `describe` that a file's or checkpoint's metadata tells."""
  if 'model' in metadata:  # of a converted file
    told = metadata['model']['arguments']
  else:  # of a training run
    told = metadata.get('config', {}).get('model', {})
    told = {**MODELS.get(told.get('name'), (None, {}))[1], **{k: v for k, v in told.items() if v}}
  result = {key: told[key] for key in ('num_heads', 'decoder_num_heads') if told.get(key)}
  size = image_size(metadata)
  return result | ({'image_size': size} if size else {})


def pixels(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """`mean`, `std` and `eval_crop` (see configs/base.py) that a metadata tells; {} if none."""
  told = metadata.get('data') or metadata.get('config', {}).get('data', {})
  return {key: told[key] for key in ('mean', 'std', 'eval_crop') if key in told}


def image_size(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
  """(height, width) that a file's or checkpoint's metadata tells, if it does."""
  size = metadata.get('image_size') or metadata.get('config', {}).get('image_size')
  if isinstance(size, int):
    return size, size
  return tuple(size) if size else None


def describe(arrays: Mapping[str, np.ndarray], source: str, **known: Any) -> Described:
  """Infers the model.

  Args:
    arrays: name -> array in PyTorch's layout, with the official names.
    source: for messages.
    **known: arguments that shapes do not tell, above all `num_heads` where a head has not 64
      channels, and `image_size` where images were not square.

  Raises:
    UserError: this is no HiViT, or an argument cannot be inferred.
  """
  try:
    return _describe(arrays, source, known)
  except KeyError as error:
    some = ', '.join(sorted(arrays)[:4])
    raise UserError(
      f'{source} is not a HiViT checkpoint: it has no {error.args[0]}; it has {some}, ...'
    ) from None


def _describe(arrays: Mapping[str, np.ndarray], source: str, known: dict[str, Any]) -> Described:
  shape = {name: tuple(value.shape) for name, value in arrays.items()}
  patch, channels, *_ = shape['patch_embed.proj.weight']
  width = shape['absolute_pos_embed'][2]
  if patch * 4 != width:
    raise UserError(
      f'{source} is not a HiViT checkpoint: its stages have {patch}, {width} channels'
    )
  stages = _stages(arrays)
  main = sum(stages[:2]) + 2  # index of the first main block
  fc1 = shape[f'blocks.{main}.mlp.fc1.weight']
  table = shape.get(f'blocks.{main}.attn.relative_position_bias_table')
  kind = family(arrays)
  heads, decoder_heads = known.pop('num_heads', None), known.pop('decoder_num_heads', None)
  arguments: dict[str, Any] = {
    'image_size': known.pop('image_size', None) or _square(shape['absolute_pos_embed'][1], source),
    'channels': channels,
    'embed_dim': width,
    'depths': (math.ceil(stages[0] / 2), math.ceil(stages[1] / 2), stages[2]),
    'num_heads': heads or (table[1] if table else _heads(width, source)),
    'rpe': table is not None,
    'mlp_ratio': fc1[0] / fc1[1],
  }
  if any(count % 2 for count in stages[:2]):
    arguments['stem_blocks'] = stages[:2]
  if 'blocks.0.mlp.fc1.weight' in shape:
    stem = shape['blocks.0.mlp.fc1.weight']
    arguments['stem_mlp_ratio'] = stem[0] / stem[1]
  if kind == 'classifier':
    arguments['num_classes'] = shape['head.weight'][0]
    if 'head_norm.running_mean' in shape:
      arguments['head_batch_norm'] = True
  elif kind == 'mae':
    decoder = shape['decoder_embed.weight']
    arguments |= {
      'decoder_embed_dim': decoder[0],
      'decoder_depth': 1 + _last(arrays, r'decoder_blocks\.(\d+)\.'),
      'decoder_num_heads': decoder_heads or _PRETRAINED_DECODER_HEADS,
      'hifeat': decoder[1] == 7 * width,
    }
  else:
    side = math.isqrt(table[0]) if table else 0
    if table and side * side == table[0]:
      size = 16 * (side + 1) // 2
      if (size, size) != arguments['image_size']:
        arguments['bias_image_size'] = (size, size)
    arguments['level_norms'] = 'fpn1.weight' in arrays
  return Described(_name(_FAMILIES[kind], arguments), arguments | known)


def _stages(arrays: Mapping[str, Any]) -> tuple[int, int, int]:
  """How many blocks lie before, between and after the two merges."""
  merges = sorted(
    int(match[1])
    for name in arrays
    if (match := re.fullmatch(r'blocks\.(\d+)\.reduction\.weight', name))
  )
  if len(merges) != 2:
    raise KeyError('two merges (blocks.N.reduction.weight)')
  last = _last(arrays, r'blocks\.(\d+)\.')
  return merges[0], merges[1] - merges[0] - 1, last - merges[1]


def _last(arrays: Mapping[str, Any], pattern: str) -> int:
  return max((int(m[1]) for name in arrays if (m := re.match(pattern, name))), default=-1)


def _square(units: int, source: str) -> tuple[int, int]:
  side = math.isqrt(units)
  if side * side != units:
    raise UserError(
      f'{source} is for images of {units} units, which is no square: give its image_size as '
      '(height, width)'
    )
  return 16 * side, 16 * side


def _heads(width: int, source: str) -> int:
  if width % _HEAD_WIDTH:
    raise UserError(f'{source}: shapes do not tell the number of heads; give num_heads')
  return width // _HEAD_WIDTH


def _name(family_name: str, arguments: Mapping[str, Any]) -> str:
  """The registered model of the same width and, if possible, depth."""

  def distance(name: str) -> tuple:
    variant = MODELS[name][1]
    depths = zip(variant['depths'], arguments['depths'], strict=True)
    return variant['embed_dim'] != arguments['embed_dim'], sum(abs(a - b) for a, b in depths)

  return min((name for name in MODELS if name.rsplit('_', 1)[0] == family_name), key=distance)
