"""Weights that do not fit a model: recognised, and explained in one line."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hivit_jax.errors import UserError, flag
from hivit_jax.interop import carried, infer
from hivit_jax.interop.files import StateDict

# A partial load must still bring all of these.
ENCODER = r'(patch_embed|blocks|layers)\..*|absolute_pos_embed|pos_embed|cls_token'
_DECODER = r'decoder_(embed|blocks|norm|pred)\..*'
_TABLE = 'relative_position_bias_table'
_SHOWN = 6  # names in an error message

# Names that only files with another decoder have -> what that does. Shapes do not show it.
_OTHER_DECODERS = (
  (r'(sarfeature\d|hogs)\..*', 'predicts gradient features of SAR images, not pixels'),
  (r'decoder_embed\.\d\..*', 'reads the feature pyramid of iTPN'),
)


def check_decoder(wanted: Mapping[str, Any], state: StateDict, partial: bool) -> None:
  """UserError unless a masked autoencoder gets its whole decoder from the weights, or nothing.

  Args:
    wanted: the model's names.
    state: the weights.
    partial: whether names may be left out.
  """
  if 'decoder_pred.weight' not in wanted:
    return
  other = _other_decoder(state)
  if other:
    raise UserError(
      f'{state.source} does not fit a masked autoencoder: its decoder {other[1]} ({other[0]}). '
      'Its encoder alone goes into a classifier or backbone, with partial=True (--partial)'
    )
  ours, theirs = (
    {name for name in names if re.fullmatch(_DECODER, name)} for names in (wanted, state.arrays)
  )
  if partial and theirs and ours != theirs:
    depths = [
      len({name.split('.')[1] for name in names if '_blocks.' in name}) for names in (theirs, ours)
    ]
    way = (
      f'create the model with decoder_depth={depths[0]}, not {depths[1]}'
      if depths[0] != depths[1]
      else f'what differs: {", ".join(sorted(ours ^ theirs)[:_SHOWN])}'
    )
    raise UserError(f'{state.source} has another decoder than this model: {way}')


def _other_decoder(state: StateDict) -> tuple[str, str] | None:
  """A name that shows that the decoder is another model's, and what that decoder does."""
  for pattern, what in _OTHER_DECODERS:
    for name in state.arrays:
      if re.fullmatch(pattern, name):
        return name, what
  return None


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
    partial: whether names outside the encoder may be missing or unused.
  """
  if partial:
    missing, unused = (
      [name for name in names if re.fullmatch(ENCODER, name) and not name.endswith(_TABLE)]
      for names in (missing, unused)
    )
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
  if base != infer.architecture(wanted):
    return f'This is {described.name}, which is another kind of model'
  differ = {}
  for key in ('embed_dim', 'depth', 'depths', 'stem_blocks'):
    ours = getattr(model, key, getattr(getattr(model, 'settings', None), key, None))
    theirs = described.arguments.get(key, ours if key == 'stem_blocks' else None)
    if ours is not None and theirs != ours:
      differ[key] = theirs, ours
  if 'depths' in differ and 'stem_blocks' not in described.arguments:
    differ.pop('stem_blocks', None)  # follows from the depths
  if differ:
    settings = ', '.join(f'{key}={theirs}, not {ours}' for key, (theirs, ours) in differ.items())
    flags = ' '.join(flag(f'model.{key}', theirs) for key, (theirs, _) in differ.items())
    return f'The weights have {settings}: create the model so, or start with {flags}'
  if there != infer.family(wanted) and not partial:
    # Of ViT and Swin there is no model without a head.
    whole = (there != 'backbone' or base == 'hivit') and not _other_decoder(state)
    return (
      f'This is {infer.KINDS[there][0]}: '
      + (f'load it into {described.name}, or ' if whole else '')
      + 'take its encoder alone with partial=True (--partial)'
    )
  if any(name.endswith(_TABLE) for name in names):
    return (
      'The checkpoint and the model differ in relative position bias: create the model with '
      f'rpe={described.arguments.get("rpe")}, or load with partial=True (--partial)'
    )
  return (
    'What the two have in common outside the encoder can be loaded with partial=True (--partial)'
  )
