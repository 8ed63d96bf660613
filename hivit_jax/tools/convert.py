"""Converts weights from PyTorch and to PyTorch, and publishes them.

  python -m hivit_jax.tools.convert from-torch FILE --out=DIR|FILE.safetensors [--model=NAME]
  python -m hivit_jax.tools.convert to-torch WORKDIR|CHECKPOINT|FILE --out=FILE.pth|FILE.safetensors
      [--layout=official|mae|simmim|segmenter|detector|backbone|mmpretrain]
  python -m hivit_jax.tools.convert to-hub WORKDIR|CHECKPOINT|FILE --out=DIR|hf-hub:OWNER/NAME

to-hub writes model.safetensors, config.json and a model card. from-torch gives a DIR a checkpoint,
as a training run writes it. docs/guide/weights.md says what loads where.
"""

import math
import pathlib
from typing import Any

from absl import flags

from hivit_jax import cli, settings
from hivit_jax.errors import UserError, suggest

_OUT = flags.DEFINE_string('out', None, 'Where to write: a directory, a file or hf-hub:OWNER/NAME.')
_LAYOUT = flags.DEFINE_string(
  'layout',
  None,
  'Whose names: official (classifier), mae, simmim, segmenter (mmsegmentation), detector '
  '(mmdetection), backbone (an encoder for dense tasks), mmpretrain. Default: that of the kind of '
  'model.',
)
_PREFIX = flags.DEFINE_string('prefix', None, "Prefix of every name, instead of the layout's.")
_MODEL = flags.DEFINE_string('model', None, 'Name of the model; default: what the weights are for.')
_EMA = flags.DEFINE_bool('ema', False, 'Use the averaged weights (EMA).')
_PARTIAL = flags.DEFINE_bool('partial', False, 'Leave out what the model does not have.')
_NUM_HEADS = flags.DEFINE_integer('num_heads', None, 'Of the encoder, if not one per 64 channels.')
_DECODER_NUM_HEADS = flags.DEFINE_integer(
  'decoder_num_heads', None, "Heads of an MAE's decoder, if not 16."
)
_MASK_RATIO = flags.DEFINE_float('mask_ratio', None, 'With which an autoencoder was trained.')
_NORM_PIX_LOSS = flags.DEFINE_bool(
  'norm_pix_loss', None, 'Whether an MAE predicts pixels normalised per unit.'
)
_IMAGE_SIZE = flags.DEFINE_string('image_size', None, 'Pixels: HEIGHTxWIDTH if not square.')


def main(argv: list[str]) -> None:
  commands = {'from-torch': _from_torch, 'to-torch': _to_torch, 'to-hub': _to_hub}
  given = argv[1] if len(argv) > 1 else ''
  if given not in commands:
    raise UserError(
      f'unknown command "{given}"{suggest(given, commands)}; name from-torch, to-torch or to-hub'
    )
  if len(argv) != 3:
    raise UserError(f'{given} takes one file or directory, got {len(argv) - 2}')
  if _OUT.value is None:
    raise UserError(f'where to? {given} {argv[2]} --out=...')
  commands[given](argv[2], pathlib.Path(_OUT.value))


def _from_torch(path: str, out: pathlib.Path) -> None:
  # Imported here, as below: --help and a mistyped flag answer at once.
  from flax import nnx

  from hivit_jax import models
  from hivit_jax.interop import carried, files, importer, torch_names
  from hivit_jax.reporting.console import setup_logging

  if files.is_weight_file(out) and out.suffix != '.safetensors':
    raise UserError(f'--out={out}: give a directory or a .safetensors file')
  setup_logging()
  state = files.read(path, ema=_EMA.value)
  described = carried.model_of(state, **_known())
  name = _MODEL.value or described.name
  arguments, guessed = dict(described.arguments), described.guessed
  if _MODEL.value in models.MODELS:  # the name says what the file may not
    same_kind = models.MODELS[_MODEL.value][0] is models.MODELS[described.name][0]
    keep = arguments if same_kind else ('image_size', 'channels', 'rpe')
    arguments = {k: arguments[k] for k in keep if k in arguments}
    own = models.variant(_MODEL.value)
    arguments |= own
    guessed = tuple(key for key in guessed if key not in own)
  model = nnx.eval_shape(lambda: models.create_model(name, **arguments))
  values, report = importer.fit(
    model, state, partial=_PARTIAL.value, image_size=arguments['image_size']
  )
  if report.new:
    raise UserError(
      f'{path} has no {", ".join(report.new[:6])}, which {name} needs: leave out --model to '
      f'convert what is there; a training takes the file as it is, --config.init={path}'
    )
  _check_finite(dict(torch_names.to_torch(*item) for item in values.items()), path)
  guessed = tuple(key for key in guessed if key in arguments)
  described = described._replace(name=name, arguments=arguments, guessed=guessed)
  metadata = carried.metadata(described, state, converted_from=pathlib.Path(path).name)
  if out.suffix == '.safetensors':
    files.write(
      out, dict(torch_names.to_torch(*item) for item in values.items()), metadata=metadata
    )
  else:
    _write_checkpoint(out, torch_names.unflatten(values), metadata)
  print(f'{report}\nwrote {name}, {_size(values)}, to {out}')


def _write_checkpoint(out: pathlib.Path, params: dict, metadata: dict) -> None:
  import jax
  import jax.numpy as jnp

  from hivit_jax.train.checkpoint import Checkpoints

  # A copy of each array only while it is written: the file's memory is given back.
  params = jax.tree.map(jnp.asarray, params)
  with Checkpoints(out / 'checkpoints') as checkpoints:
    if checkpoints.steps():
      raise UserError(f'--out={out} has checkpoints already; choose another directory')
    checkpoints.save(0, {'params': params}, metadata, wait=True)


def _to_torch(path: str, out: pathlib.Path) -> None:
  from hivit_jax.interop import carried, exporter, files
  from hivit_jax.models import targets
  from hivit_jax.reporting.console import setup_logging
  from hivit_jax.train import weights

  if not files.is_weight_file(out):
    raise UserError(f'--out={out}: the name must end in .pth or .safetensors')
  setup_logging()
  state = weights.read(path, ema=_EMA.value)
  _check_finite(state.arrays, path)
  described = carried.model_of(state, **_known())
  known = {key: described.arguments.get(key) for key in ('image_size', 'target')}
  state = state._replace(metadata=state.metadata | known)
  arrays = exporter.in_layout(state, _LAYOUT.value, prefix=_PREFIX.value)
  layout = _LAYOUT.value or exporter.default_layout(state)
  what, key = exporter.LAYOUTS[layout]
  exported = exporter.in_layout_described(state, described, arrays, layout)
  metadata = carried.metadata(exported, state, layout=layout)
  files.write(out, arrays, wrapped_in=key, metadata=metadata)
  lost = (
    sorted(set(state.arrays) & {'fc_norm.weight', 'fc_norm.bias'}) if layout == 'mmpretrain' else []
  )
  note = f'; left out, because mmpretrain has no such parameter: {", ".join(lost)}' if lost else ''
  if layout == 'backbone' and any(name.startswith('norms.') for name in state.arrays):
    note += '; left out, the norms of the stages, norms.*: they belong to the dense model'
  if layout == 'mae' and described.arguments.get('target') == targets.SARATRX_V2:
    note += '; left out, constants of its code: hogs.SAR_Lay*, load with strict=False'
  print(f'wrote {len(arrays)} arrays, {_size(arrays)}, for {what} to {out}{note}')


def _to_hub(path: str, out: pathlib.Path) -> None:
  from hivit_jax.interop import hub
  from hivit_jax.reporting.console import setup_logging
  from hivit_jax.train import publish

  for flag in (_LAYOUT, _PREFIX, _MODEL, _PARTIAL):
    if flag.value != flag.default:
      raise UserError(f'to-hub has no --{flag.name}: it publishes the whole model as it is')
  setup_logging()
  options = {'ema': _EMA.value, **_known()}
  if hub.is_name(out):
    name = publish.push_to_hub(path, str(out), **options)
    print(f'uploaded; to pin this version: hivit_jax.create_model({name!r})')
  else:
    publish.save_pretrained(path, out, **options)
    print(f'wrote {out}; read and complete {out / hub.CARD} before you publish it')


def _check_finite(arrays: dict, path: str) -> None:
  from hivit_jax.interop import files

  bad = files.not_finite(arrays)
  if bad:
    more = f' and {len(bad) - 1} more parameters hold' if len(bad) > 1 else ' holds'
    raise UserError(
      f'{path} was not converted: {bad[0]}{more} NaN or infinite numbers: a damaged file, or a '
      'training that diverged; take an earlier checkpoint'
    )


def _known() -> dict[str, Any]:
  """What the flags say about the model."""
  options = (_NUM_HEADS, _DECODER_NUM_HEADS, _MASK_RATIO, _NORM_PIX_LOSS)
  known: dict[str, Any] = {flag.name: flag.value for flag in options if flag.value is not None}
  if _IMAGE_SIZE.value:
    known['image_size'] = settings.image_size(_IMAGE_SIZE.value, '--image_size')
  return known


def _size(arrays: dict) -> str:
  return f'{sum(math.prod(value.shape) for value in arrays.values()):,} numbers'


if __name__ == '__main__':
  cli.run(main)
