"""Arguments of models, from the names and shapes of their parameters.

What a layout must have and a file has not, raises a KeyError or ValueError here.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from hivit_jax.errors import UserError
from hivit_jax.interop import detector, segmenter
from hivit_jax.interop import fast_itpn as joined_names
from hivit_jax.models import targets

_HEAD_WIDTH = 64  # channels of an attention head in every published HiViT and ViT
LAYER_SCALE = 0.1  # what the published scales started as
TABLE = 'relative_position_bias_table'
ITPN_EMBED = 'decoder_embed.0.1.weight'  # of iTPN's decoder, which reads its pyramid
Shapes = Mapping[str, tuple[int, ...]]
Size = tuple[int, int]

# What a state dict can be -> how it is called, and what the names of its models begin with.
KINDS = {
  'classifier': ('a classifier', ''),
  'mae': ('an MAE checkpoint (with a decoder)', 'mae_'),
  'simmim': ('a SimMIM checkpoint (with a decoder)', 'simmim_'),
  'segmenter': ('a segmenter', 'segment_'),
  'detector': ('a detector', 'detect_'),
  'backbone': ('a backbone without head', 'backbone_'),
}


def family(arrays: Mapping[str, Any]) -> str:
  """One of `KINDS`."""
  if 'decoder_pred.weight' in arrays and {'decoder_embed.weight', ITPN_EMBED} & set(arrays):
    return 'mae'
  if 'decoder.0.weight' in arrays:
    return 'simmim'
  if segmenter.CLASSIFIER in arrays:
    return 'segmenter'
  if detector.CLASSIFIER in arrays or detector.CASCADE in arrays:
    return 'detector'
  return 'classifier' if 'head.weight' in arrays else 'backbone'


def architecture(arrays: Mapping[str, Any]) -> str:
  """'fast_itpn', 'itpn' with its decoder, 'vit', 'swin', or 'hivit' for everything else."""
  if any(name.startswith('layers.') for name in arrays):
    return 'swin'
  if joined_names.is_fast_itpn(arrays):
    return 'fast_itpn'
  if 'pos_embed' in arrays:
    return 'vit'
  return 'itpn' if 'decoder_pred.weight' in arrays and ITPN_EMBED in arrays else 'hivit'


def hivit(shape: Shapes, source: str, heads: int | None, size: Size | None) -> dict[str, Any]:
  patch, channels, *_ = shape['patch_embed.proj.weight']
  width = shape['absolute_pos_embed'][2]
  if patch * 4 != width:
    raise ValueError('widths of the stages')
  stages = _stages(shape)
  main = sum(stages[:2]) + 2  # index of the first main block
  table = shape.get(f'blocks.{main}.attn.relative_position_bias_table')
  arguments: dict[str, Any] = {
    'image_size': size or _square(shape['absolute_pos_embed'][1], source),
    'channels': channels,
    'embed_dim': width,
    'depths': (math.ceil(stages[0] / 2), math.ceil(stages[1] / 2), stages[2]),
    'num_heads': heads or (table[1] if table else _heads(width, source)),
    'rpe': table is not None,
    'mlp_ratio': _ratio(shape, f'blocks.{main}'),
  }
  if any(count % 2 for count in stages[:2]):
    arguments['stem_blocks'] = stages[:2]
  if f'blocks.{main}.gamma_1' in shape:
    arguments['layer_scale'] = LAYER_SCALE
  if 'blocks.0.mlp.fc1.weight' in shape:
    arguments['stem_mlp_ratio'] = _ratio(shape, 'blocks.0')
  kind = family(shape)
  if kind == 'mae' and 'decoder_embed.weight' in shape:
    arguments['hifeat'] = shape['decoder_embed.weight'][1] == 7 * width
  elif kind == 'backbone':
    side = math.isqrt(table[0]) if table else 0
    if table and side * side == table[0]:
      tables_size = 16 * (side + 1) // 2
      if (tables_size, tables_size) != arguments['image_size']:
        arguments['bias_image_size'] = (tables_size, tables_size)
    arguments['level_norms'] = 'fpn1.weight' in shape
  return arguments


def itpn(shape: Shapes, source: str, heads: int | None, size: Size | None) -> dict[str, Any]:
  return hivit(shape, source, heads, size) | pyramid(shape)


def target(arrays: Mapping[str, Any]) -> str:
  """What an autoencoder predicts, by the constants that its code keeps beside its parameters."""
  if any(name.startswith('hogs.') for name in arrays):
    return targets.SARATRX_V2
  if any(name.startswith('sarfeature') for name in arrays):
    return targets.SARATRX
  return targets.PIXELS


def pyramid(shape: Shapes) -> dict[str, int]:
  """Settings of iTPN's feature pyramid, if there is one."""
  if 'align_dim_16to8.weight' not in shape:
    return {}
  return {
    'fpn_dim': shape['align_dim_16to8.weight'][0],
    'fpn_depth': 1 + last(shape, r'block_16to8\.(\d+)\.'),
  }


def fast_itpn(shape: Shapes, source: str, heads: int | None, size: Size | None) -> dict[str, Any]:
  width = shape['pos_embed'][2]
  if shape['patch_embed.proj.weight'][0] * 4 != width:
    raise ValueError('widths of the stages')
  stages = _stages(shape)
  main = sum(stages[:2]) + 2
  arguments: dict[str, Any] = {
    'image_size': size or _square(search_units(shape) or shape['pos_embed'][1], source),
    'channels': shape['patch_embed.proj.weight'][1],
    'embed_dim': width,
    'depths': stages,
    'num_heads': heads or _heads(width, source),
    'mlp_ratio': _ratio(shape, f'blocks.{main}', 'w1'),
    'layer_scale': LAYER_SCALE if f'blocks.{main}.gamma_1' in shape else None,
  }
  if 'blocks.0.mlp.fc1.weight' in shape:
    arguments['stem_mlp_ratio'] = _ratio(shape, 'blocks.0')
  if family(shape) == 'backbone':
    arguments['level_norms'] = 'fpn1.weight' in shape
  return arguments


def search_units(shape: Shapes) -> int | None:
  """Units of a tracker's search region, whose positions come before those of its template.

  Returns:
    Their number where a file is a tracker's, both regions are square, and one is larger.
  """
  if 'search_token' not in shape or 'pos_embed' not in shape:
    return None
  units = shape['pos_embed'][1]
  for side in range(math.isqrt(units), 0, -1):
    rest = units - side * side
    if 0 < rest < side * side and math.isqrt(rest) ** 2 == rest:
      return side * side
  return None


def vit(shape: Shapes, source: str, heads: int | None, size: Size | None) -> dict[str, Any]:
  width, channels, *_ = shape['patch_embed.proj.weight']
  units = shape['pos_embed'][1] - shape['cls_token'][1]
  return {
    'image_size': size or _square(units, source),
    'channels': channels,
    'embed_dim': width,
    'depth': 1 + last(shape, r'blocks\.(\d+)\.'),
    'num_heads': heads or _heads(width, source),
    'mlp_ratio': _ratio(shape, 'blocks.0'),
  }


def swin(shape: Shapes, source: str, heads: Any, size: Size | None) -> dict[str, Any]:
  del heads  # the tables tell
  width, channels, *_ = shape['patch_embed.proj.weight']
  stages = range(1 + last(shape, r'layers\.(\d+)\.'))
  name = 'layers.{}.blocks.0.attn.relative_position_bias_table'
  without = sum(name.format(i) not in shape for i in stages)  # stages, the first ones
  # Of those the numbers of heads and windows mean nothing.
  tables = [shape[name.format(max(i, min(without, stages[-1])))] for i in stages]
  windows = [(math.isqrt(entries) + 1) // 2 for entries, _ in tables]
  masks = [
    (shape[name][0], 4 * 2**i * windows[i])
    for i in stages
    if (name := f'layers.{i}.blocks.1.attn_mask') in shape
  ]
  # Without a mask to count the windows, the last map is one: so it is in all that are published.
  count, side = masks[0] if masks else (1, 4 * 2 ** stages[-1] * windows[-1])
  return {
    'image_size': size or _square(count, source, side, 'windows'),
    'channels': channels,
    'embed_dim': width,
    'depths': tuple(1 + last(shape, rf'layers\.{i}\.blocks\.(\d+)\.') for i in stages),
    'num_heads': tuple(heads for _, heads in tables),
    # Smaller ones after the largest are cut by their map.
    'window_size': windows[0] if windows[0] == max(windows) else tuple(windows),
    **({'mlp_stages': without} if without else {}),
    'mlp_ratio': _ratio(shape, 'layers.0.blocks.0'),
  }


def _ratio(shape: Shapes, block: str, first: str = 'fc1') -> float:
  """The `mlp_ratio` of which models make the hidden width of a block."""
  hidden, width = shape[f'{block}.mlp.{first}.weight'][:2]
  ratio = hidden / width
  return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _stages(arrays: Mapping[str, Any]) -> tuple[int, int, int]:
  """How many blocks lie before, between and after the two merges."""
  merges = sorted(
    int(match[1])
    for name in arrays
    if (match := re.fullmatch(r'blocks\.(\d+)\.reduction\.weight', name))
  )
  if len(merges) != 2:
    raise KeyError('two merges (blocks.N.reduction.weight)')
  blocks = last(arrays, r'blocks\.(\d+)\.')
  return merges[0], merges[1] - merges[0] - 1, blocks - merges[1]


def last(arrays: Mapping[str, Any], pattern: str) -> int:
  return max((int(m[1]) for name in arrays if (m := re.match(pattern, name))), default=-1)


def _square(cells: int, source: str, side: int = 16, name: str = 'units') -> Size:
  """The size of images that `cells` squares of `side` pixels cover."""
  count = math.isqrt(cells)
  if count * count != cells:
    raise UserError(
      f'{source} is for images of {cells} {name}, which is not a square: give its image_size as '
      '(height, width)'
    )
  return side * count, side * count


def _heads(width: int, source: str) -> int:
  if width % _HEAD_WIDTH:
    raise UserError(f'{source}: shapes do not show the number of heads; give num_heads')
  return width // _HEAD_WIDTH
