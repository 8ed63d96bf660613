"""Which model a state dict belongs to, inferred from its names and shapes."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hivit_jax import settings
from hivit_jax.errors import UserError
from hivit_jax.interop import detector, segmenter
from hivit_jax.models import MODELS, settings_of

_HEAD_WIDTH = 64  # channels of an attention head in every published HiViT and ViT
_PRETRAINED_DECODER_HEADS = 16
_TABLE = 'relative_position_bias_table'
_Shapes = Mapping[str, tuple[int, ...]]
_Size = tuple[int, int]
# What a state dict can be -> how it is called, and what the names of its models begin with.
KINDS = {
  'classifier': ('a classifier', ''),
  'mae': ('an MAE checkpoint (with a decoder)', 'mae_'),
  'simmim': ('a SimMIM checkpoint (with a decoder)', 'simmim_'),
  'segmenter': ('a segmenter', 'segment_'),
  'detector': ('a detector', 'detect_'),
  'backbone': ('a backbone without head', 'backbone_'),
}


# Arguments that no shape shows, beside numbers of heads.
INVISIBLE = ('mask_ratio', 'norm_pix_loss')
# Arguments that change how a model is computed, not what: they are the user's, not the weights'.
COMPUTATION = frozenset(('dtype', 'attention', 'ops', 'remat', 'scan'))


class Described(NamedTuple):
  """`create_model(name, **arguments)` has the parameters of the state dict.

  Attributes:
    name: of the model.
    arguments: of its class.
    guessed: arguments that nothing determines; they have the values of the published models.
  """

  name: str
  arguments: dict[str, Any]
  guessed: tuple[str, ...] = ()


def family(arrays: Mapping[str, Any]) -> str:
  """One of `KINDS`."""
  if 'decoder_pred.weight' in arrays and 'decoder_embed.weight' in arrays:
    return 'mae'
  if 'decoder.0.weight' in arrays:
    return 'simmim'
  if segmenter.CLASSIFIER in arrays:
    return 'segmenter'
  if detector.CLASSIFIER in arrays:
    return 'detector'
  return 'classifier' if 'head.weight' in arrays else 'backbone'


def architecture(arrays: Mapping[str, Any]) -> str:
  """'vit', 'swin', or 'hivit' for everything else."""
  if any(name.startswith('layers.') for name in arrays):
    return 'swin'
  return 'vit' if 'pos_embed' in arrays else 'hivit'


def pixels(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """`mean`, `std` and `eval_crop` (see configs/base.py) in a metadata; {} if there are none."""
  told = metadata.get('data') or metadata.get('config', {}).get('data', {})
  return {key: told[key] for key in ('mean', 'std', 'eval_crop') if key in told}


def image_size(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
  """(height, width) in a file's or checkpoint's metadata, or None."""
  size = metadata.get('image_size') or metadata.get('config', {}).get('image_size')
  return settings.image_size(size, 'image_size of the weights') if size else None


def known_size(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """`image_size` as an argument of a model, if a metadata has it."""
  size = image_size(metadata)
  return {'image_size': size} if size else {}


def tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Settings as models and configs have them: JSON knows no tuples."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def defaults(name: str) -> dict[str, Any]:
  """Arguments of a model where none are given, `COMPUTATION` aside; {} for an unknown name."""
  if name not in MODELS:
    return {}
  return {key: value for key, value in settings_of(name).items() if key not in COMPUTATION}


def describe(arrays: Mapping[str, np.ndarray], source: str, **known: Any) -> Described:
  """Infers the model from names and shapes alone.

  Args:
    arrays: name -> array in PyTorch's layout, with the official names.
    source: for messages.
    **known: arguments that shapes do not show, above all `num_heads` where a head has not 64
      channels, and `image_size` where images were not square.

  Returns:
    The model. Of ViT and Swin without a head it is the classifier, whose encoder it is.

  Raises:
    UserError: it is none of the models here, or an argument cannot be inferred.
  """
  kind, base = family(arrays), architecture(arrays)
  label, tell, patch = {
    'hivit': ('HiViT', _hivit, 4), 'vit': ('ViT', _vit, 16), 'swin': ('Swin', _swin, 4)
  }[base]  # fmt: skip
  shape = {name: tuple(value.shape) for name, value in arrays.items()}
  told = {key: known.pop(key, None) for key in ('num_heads', 'decoder_num_heads', 'image_size')}
  try:
    sides = shape['patch_embed.proj.weight'][2:]
    if sides != (patch, patch):
      raise UserError(
        f'{source} has patches of {"x".join(map(str, sides))} pixels; {label} has them of '
        f'{patch}x{patch} here'
      )
    size = told['image_size']
    own = known.pop('position_image_size', None) if kind in ('segmenter', 'detector') else size
    arguments = tell(shape, source, told['num_heads'], own)
    if kind == 'classifier':
      arguments['num_classes'] = shape['head.weight'][0]
      if 'head_norm.running_mean' in shape:
        arguments['head_batch_norm'] = True
    elif kind == 'segmenter':
      arguments = segmenter.arguments(shape, arguments, size)
    elif kind == 'detector':
      arguments = detector.arguments(shape, arguments, size)
    elif kind == 'mae':
      arguments |= {
        'decoder_embed_dim': shape['decoder_embed.weight'][0],
        'decoder_depth': 1 + _last(shape, r'decoder_blocks\.(\d+)\.'),
        'decoder_num_heads': told['decoder_num_heads'] or _PRETRAINED_DECODER_HEADS,
      }
  except KeyError as error:
    some = ', '.join(sorted(arrays)[:4])
    raise UserError(
      f'{source} is not a {label} checkpoint: it has no {error.args[0]}; it has {some}, ...'
    ) from None
  if kind == 'backbone' and base != 'hivit':
    kind = 'classifier'
  name = _name(KINDS[kind][1] + base, arguments, source)
  guessed = []
  if not told['num_heads'] and base != 'swin' and not any(key.endswith(_TABLE) for key in shape):
    guessed.append('num_heads')
  if kind == 'mae' and not told['decoder_num_heads']:
    guessed.append('decoder_num_heads')
  if kind == 'detector':
    guessed += [key for key in detector.GUESSED if key not in known]
  invisible = {key: value for key, value in defaults(name).items() if key in INVISIBLE}
  guessed += [key for key in invisible if key not in known]
  return Described(name, arguments | invisible | known, tuple(guessed))


def _hivit(shape: _Shapes, source: str, heads: int | None, size: _Size | None) -> dict[str, Any]:
  patch, channels, *_ = shape['patch_embed.proj.weight']
  width = shape['absolute_pos_embed'][2]
  if patch * 4 != width:
    raise UserError(
      f'{source} is not a HiViT checkpoint: its stages have {patch}, {width} channels'
    )
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
  if 'blocks.0.mlp.fc1.weight' in shape:
    arguments['stem_mlp_ratio'] = _ratio(shape, 'blocks.0')
  kind = family(shape)
  if kind == 'mae':
    arguments['hifeat'] = shape['decoder_embed.weight'][1] == 7 * width
  elif kind == 'backbone':
    side = math.isqrt(table[0]) if table else 0
    if table and side * side == table[0]:
      tables_size = 16 * (side + 1) // 2
      if (tables_size, tables_size) != arguments['image_size']:
        arguments['bias_image_size'] = (tables_size, tables_size)
    arguments['level_norms'] = 'fpn1.weight' in shape
  return arguments


def _vit(shape: _Shapes, source: str, heads: int | None, size: _Size | None) -> dict[str, Any]:
  width, channels, *_ = shape['patch_embed.proj.weight']
  units = shape['pos_embed'][1] - shape['cls_token'][1]
  return {
    'image_size': size or _square(units, source),
    'channels': channels,
    'embed_dim': width,
    'depth': 1 + _last(shape, r'blocks\.(\d+)\.'),
    'num_heads': heads or _heads(width, source),
    'mlp_ratio': _ratio(shape, 'blocks.0'),
  }


def _swin(shape: _Shapes, source: str, heads: Any, size: _Size | None) -> dict[str, Any]:
  del heads  # the tables tell
  width, channels, *_ = shape['patch_embed.proj.weight']
  stages = range(1 + _last(shape, r'layers\.(\d+)\.'))
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
    'depths': tuple(1 + _last(shape, rf'layers\.{i}\.blocks\.(\d+)\.') for i in stages),
    'num_heads': tuple(heads for _, heads in tables),
    # Smaller ones after the largest are cut by their map.
    'window_size': windows[0] if windows[0] == max(windows) else tuple(windows),
    **({'mlp_stages': without} if without else {}),
    'mlp_ratio': _ratio(shape, 'layers.0.blocks.0'),
  }


def _ratio(shape: _Shapes, block: str) -> float:
  hidden, width = shape[f'{block}.mlp.fc1.weight']
  return hidden / width


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


def _square(cells: int, source: str, side: int = 16, name: str = 'units') -> _Size:
  """The size of images that `cells` squares of `side` pixels cover."""
  count = math.isqrt(cells)
  if count * count != cells:
    raise UserError(
      f'{source} is for images of {cells} {name}, which is no square: give its image_size as '
      '(height, width)'
    )
  return side * count, side * count


def _heads(width: int, source: str) -> int:
  if width % _HEAD_WIDTH:
    raise UserError(f'{source}: shapes do not tell the number of heads; give num_heads')
  return width // _HEAD_WIDTH


def _name(family_name: str, arguments: Mapping[str, Any], source: str) -> str:
  """The registered model of the same width and, if possible, depth."""

  def depths(arguments: Mapping[str, Any]) -> Sequence[int]:
    return arguments.get('depths') or (arguments['depth'],)

  def distance(name: str) -> tuple:
    own = settings_of(name)
    pairs = itertools.zip_longest(depths(own), depths(arguments), fillvalue=0)
    return own['embed_dim'] != arguments['embed_dim'], sum(abs(a - b) for a, b in pairs)

  names = [name for name in MODELS if name.rsplit('_', 1)[0] == family_name]
  if not names:
    raise UserError(f'{source} is a {family_name}, of which there is no model here')
  return min(names, key=distance)
