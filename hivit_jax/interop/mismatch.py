"""Weights that do not fit a model: recognised, and explained in one line."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hivit_jax.errors import UserError, flag
from hivit_jax.interop import carried, infer, layer_scale, shapes
from hivit_jax.interop.files import StateDict
from hivit_jax.models import targets

# A partial load must still bring all of these.
ENCODER = r'(patch_embed|blocks|layers)\..*|absolute_pos_embed|pos_embed|cls_token'
PYRAMID = r'(align_dim_\w+|fpn_modules|split_\d+to\d+|block_\d+to\d+)\..*'  # of iTPN
_DECODER = r'decoder_(embed|blocks|norm|pred)\..*'
_CLASSIFIERS = re.compile(r'((.*_)?head\.(conv_seg\.)?|.*\.(fc_cls|fc_reg|conv_logits)\.)\w+')
_TABLE = 'relative_position_bias_table'
_SHOWN = 6  # names in an error message

# What encoders are published with and no classifier has a place for: of a decoder that is not in
# the file the mask token and the norm before it; what predicts CLIP's features in iTPN-CLIP and
# Fast-iTPN.
_LEFTOVERS = (
  r'mask_token|(fc_)?norm(_cls)?\.(weight|bias)|decoder_embed\.\d\.\d\..*|lm_(cls_)?head\.(weight|bias)|'
  r'cls_pt_layers\..*'
)

# Target of an autoencoder -> what its decoder does.
_TARGETS = {
  targets.PIXELS: 'predicts pixels',
  targets.SARATRX: 'predicts gradient features of SAR images, not pixels',
  targets.SARATRX_V2: 'predicts fused features of SAR images, not pixels',
}


def check_decoder(model: Any, wanted: Mapping[str, Any], state: StateDict, partial: bool) -> None:
  """UserError unless a masked autoencoder gets its whole decoder from the weights, or nothing.

  Args:
    model: from `create_model`.
    wanted: its names.
    state: the weights.
    partial: whether names may be left out.
  """
  if 'decoder_pred.weight' not in wanted:
    return
  embeds = [name for name in state.arrays if re.fullmatch(r'decoder_embed\.\d\..*', name)]
  if embeds and embeds[0] not in wanted:
    raise UserError(_other(state, f'reads the feature pyramid of iTPN ({embeds[0]})'))
  target = _target(state)
  if 'decoder_pred.weight' in state.arrays and target != model.predicts:
    names = [name for name in state.arrays if re.fullmatch(r'(sarfeature\d|hogs)\..*', name)]
    shown = f' ({names[0]})' if names else ''
    way = f'; for its decoder create the model with target={target}'
    raise UserError(_other(state, _TARGETS[target] + shown) + way)
  ours, theirs = (
    {name for name in names if re.fullmatch(_DECODER, name)} for names in (wanted, state.arrays)
  )
  if theirs and ours != theirs and (partial or 'decoder_embed.0.1.weight' in wanted):
    depths = [
      len({name.split('.')[1] for name in names if '_blocks.' in name}) for names in (theirs, ours)
    ]
    way = (
      f'create the model with decoder_depth={depths[0]}, not {depths[1]}'
      if depths[0] != depths[1]
      else f'what differs: {", ".join(sorted(ours ^ theirs)[:_SHOWN])}'
    )
    raise UserError(f'{state.source} has another decoder than this model: {way}')


def _target(state: StateDict) -> str:
  """What the decoder of the weights predicts: they carry it, or constants show it."""
  told = carried.read(state.metadata)
  known = told.arguments.get('target') if told else None
  return known or shapes.target(state.arrays)


def _other(state: StateDict, what: str) -> str:
  return (
    f'{state.source} does not fit this autoencoder: its decoder {what}. Its encoder alone goes '
    'into a classifier or backbone, with partial=True (--partial)'
  )


def check_heads(model: Any, state: StateDict) -> None:
  """UserError if the weights carry other numbers of heads, which no shape would show."""
  told = carried.read(state.metadata)
  if told is None:
    return
  encoder = getattr(model, 'backbone', model)
  parts = {'num_heads': getattr(encoder, 'blocks', None)}
  if 'decoder_pred.weight' in state.arrays:
    parts['decoder_num_heads'] = getattr(model, 'decoder_blocks', None)
  for key, blocks in parts.items():
    theirs = told.arguments.get(key)
    if not blocks or theirs is None or key in told.guessed or not hasattr(blocks[-1], 'attn'):
      continue
    ours = blocks[-1].attn.heads
    if ours != theirs:
      raise UserError(
        f'{state.source} does not fit this model: it was trained with {key}={theirs}, the model '
        f'has {ours}: create the model with {key}={theirs} (--config.model.{key}={theirs})'
      )


def check(
  model: Any,
  wanted: Mapping[str, Any],
  state: StateDict,
  missing: Sequence[str],
  unused: Sequence[str],
  misshaped: Sequence[str],
  partial: bool,
) -> None:
  """UserError unless everything fits, or what does not is meant to be left out.

  Args:
    model: from `create_model`.
    wanted: its names.
    state: the weights.
    missing, unused: names that only the model, only the weights have.
    misshaped: texts about names that both have.
    partial: whether names outside the encoder may be missing or unused. Of an encoder alone, all
      such names may be missing in any case: they are new.
  """
  alone = infer.family(state.arrays) == 'backbone'
  pyramid = has_pyramid(wanted) and has_pyramid(state.arrays)
  if partial or alone:
    missing = [name for name in missing if _of_encoder(name, pyramid)]
  if partial:
    unused = [name for name in unused if _of_encoder(name, pyramid)]
  elif alone:
    unused = [name for name in unused if not re.fullmatch(_LEFTOVERS, name)]
  if not (missing or unused or misshaped):
    return
  parts = [
    f'{what}: {"; ".join(names[:_SHOWN])}'
    + (f'; and {len(names) - _SHOWN} more' if len(names) > _SHOWN else '')
    for what, names in (('missing', missing), ('unused', unused), ('of another shape', misshaped))
    if names
  ]
  cause = _cause(model, wanted, state, [*missing, *unused], partial)
  raise UserError(f'{state.source} does not fit this model. {". ".join(parts)}. {cause}')


def may_be_new(name: str, state: StateDict, partial: bool) -> bool:
  """Whether a parameter that has another shape in the weights is drawn anew: a head of other
  classes in a partial load, what remains of a decoder that is not there."""
  if infer.family(state.arrays) == 'backbone':
    return bool(re.fullmatch(_LEFTOVERS, name))
  return partial and bool(_CLASSIFIERS.fullmatch(name))


def has_pyramid(names: Iterable[str]) -> bool:
  """Whether a model or file has iTPN's feature pyramid."""
  return any(re.fullmatch(PYRAMID, name) for name in names)


def _of_encoder(name: str, pyramid: bool) -> bool:
  """Whether a model without it would compute something else; bias tables may start at zero.

  Where both sides have a pyramid, it counts as a part of the encoder.
  """
  of_encoder = re.fullmatch(ENCODER, name) or (pyramid and re.fullmatch(PYRAMID, name))
  return bool(of_encoder) and not name.endswith(_TABLE)


def _cause(
  model: Any, wanted: Mapping[str, Any], state: StateDict, names: Sequence[str], partial: bool
) -> str:
  """The likely reason, and what to do."""
  there, base = infer.family(state.arrays), infer.architecture(state.arrays)
  try:
    # Heads have no part in the comparison.
    known = {'num_heads': 1} | infer.known_size(state.metadata)
    described = infer.describe(state.arrays, state.source, **known)
  except UserError as error:
    return str(error)
  if {base, infer.architecture(wanted)} not in ({base}, {'hivit', 'itpn'}):  # one encoder
    return f'This is {described.name}, a different kind of model'
  differ = {}
  sizes = {name: value.shape for name, value in state.arrays.items()}
  told: dict[str, Any] = {**shapes.pyramid(sizes), **described.arguments}
  if base in ('hivit', 'itpn'):
    told.setdefault('stem_blocks', tuple(2 * count for count in told['depths'][:2]))
  for key in ('embed_dim', 'depth', 'depths', 'stem_blocks', 'fpn_dim', 'fpn_depth'):
    ours = getattr(model, key, getattr(getattr(model, 'settings', None), key, None))
    theirs = told.get(key, ours if key in ('stem_blocks', 'fpn_dim', 'fpn_depth') else None)
    if ours is not None and theirs != ours:
      differ[key] = theirs, ours
  if 'depths' in differ and 'stem_blocks' not in described.arguments:
    differ.pop('stem_blocks', None)  # follows from the depths
  scales = layer_scale.has(state.arrays)
  if differ and scales != layer_scale.has(wanted):
    differ['layer_scale'] = (shapes.LAYER_SCALE, None) if scales else (None, shapes.LAYER_SCALE)
  if differ:
    settings = ', '.join(f'{key}={theirs}, not {ours}' for key, (theirs, ours) in differ.items())
    flags = ' '.join(flag(f'model.{key}', theirs) for key, (theirs, _) in differ.items())
    return f'The weights have {settings}: create the model that way, or start with {flags}'
  if there == 'backbone' and base in ('hivit', 'fast_itpn') and there != infer.family(wanted):
    return (
      f'This is {described.name}, an encoder: it must be complete, and nothing may be left over'
    )
  if there != infer.family(wanted) and not partial:
    # Of ViT and Swin there is no model without a head.
    whole = there != 'backbone' and _target(state) == targets.PIXELS
    return (
      f'This is {infer.KINDS[there][0]}: '
      + (f'load it into {described.name}, or ' if whole else '')
      + 'load only its encoder with partial=True (--partial)'
    )
  if scales != layer_scale.has(wanted):
    if not scales:
      return (
        'The weights have no scales of residual branches: create the model with layer_scale=None'
      )
    return (
      f'The weights have scales of residual branches: create the model with layer_scale='
      f'{shapes.LAYER_SCALE}, or for inference make them part of the weights, fold_layer_scale=True'
    )
  if any(name.endswith(_TABLE) for name in names):
    return (
      'The checkpoint and the model differ in relative position bias: create the model with '
      f'rpe={described.arguments.get("rpe")}, or load with partial=True (--partial)'
    )
  return (
    'What the two have in common outside the encoder can be loaded with partial=True (--partial)'
  )
