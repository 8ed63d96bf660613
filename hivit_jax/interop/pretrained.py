"""Directories with a model, as timm and the Hugging Face Hub have them.

`model.safetensors` has the state dict under PyTorch's names and, in its metadata, the model with
all arguments; `config.json` says in timm's words what the model is and how its images are prepared.
timm builds ViT and Swin from it.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from hivit_jax.errors import UserError
from hivit_jax.interop import carried, exporter, files, infer
from hivit_jax.interop.files import StateDict
from hivit_jax.interop.infer import Described

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'

# Family -> timm's name for a size, arguments that always hold, those that both have, its head.
_TIMM = {
  'vit': (
    'vit_{}_patch16_224',
    {'global_pool': 'avg'},
    ('embed_dim', 'depth', 'num_heads', 'mlp_ratio'),
    'head',
  ),
  'swin': (
    'swin_{}_patch4_window7_224',
    {},
    ('embed_dim', 'depths', 'num_heads', 'mlp_ratio', 'window_size'),
    'head.fc',
  ),
}


def write(
  directory: pathlib.Path, state: StateDict, described: Described, num_features: int
) -> dict[str, Any]:
  """Writes both files; those of the same names are replaced.

  Args:
    directory: created if needed.
    state: all parameters of the model; its metadata has pixel statistics and class names.
    described: the model.
    num_features: channels of its last feature map.

  Returns:
    What `config.json` has.

  Raises:
    UserError: a file cannot be written.
  """
  arrays, exported = exporter.whole(state, described)
  files.write(directory / WEIGHTS, arrays, metadata=carried.metadata(exported, state))
  content = _config(state, exported, num_features)
  path = directory / CONFIG
  try:
    path.write_text(json.dumps(content, indent=2) + '\n', 'utf-8')
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}') from error
  return content


def holds(directory: pathlib.Path) -> bool:
  """Whether a directory has a model for `read`."""
  return (directory / WEIGHTS).is_file()


def read(directory: pathlib.Path, *, ema: bool = False) -> StateDict:
  """Reads what `write` or timm wrote; timm has image size and pixel statistics in its config.

  Raises:
    UserError: a file is missing or damaged.
  """
  state = files.read(directory / WEIGHTS, ema=ema)
  if state.metadata or not (directory / CONFIG).is_file():
    return state
  path = directory / CONFIG
  try:
    return state._replace(metadata=_metadata(json.loads(path.read_bytes())))
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f'{path} is not the config.json of a model: {error}') from None


def _config(state: StateDict, described: Described, num_features: int) -> dict[str, Any]:
  arguments = described.arguments
  architecture, own, head = _architecture(described)
  classes = arguments.get('num_classes', 0)
  size = arguments['image_size']
  dense = infer.family(state.arrays) in ('segmenter', 'detector')  # they take whole images
  # The default crop of evaluations here.
  crop = carried.pixels(state, described).get('eval_crop') or (0.875 if max(size) <= 224 else 1.0)
  names = state.metadata.get('class_names')
  return {
    'architecture': architecture,
    'num_classes': classes,
    'num_features': num_features,
    'global_pool': 'avg',
    **({'label_names': names} if names and len(names) == classes else {}),
    'model_args': own,
    'pretrained_cfg': {
      'input_size': [arguments['channels'], *size],
      'fixed_input_size': True,
      **({} if dense else {'interpolation': 'bicubic', 'crop_pct': crop, 'crop_mode': 'center'}),
      **carried.statistics(state, described),
      'num_classes': classes,
      'first_conv': 'patch_embed.proj',
      'classifier': head,
    },
  }


def _architecture(described: Described) -> tuple[str, dict[str, Any], str]:
  """Name, arguments and head in timm if it has such a model, else here."""
  name, arguments, _ = described
  family, _, size = name.rpartition('_')
  if family not in _TIMM or arguments.get('mlp_stages') or arguments.get('global_stages'):
    usual = infer.defaults(name)
    return name, {key: value for key, value in arguments.items() if value != usual[key]}, 'head'
  pattern, always, shared, head = _TIMM[family]
  own = {key: arguments[key] for key in shared}
  size_and_channels = {'img_size': arguments['image_size'], 'in_chans': arguments['channels']}
  return pattern.format(size), {**own, **size_and_channels, **always}, head


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
  """What `carried` and `infer` look for, from timm's config."""
  known = config.get('pretrained_cfg', config)
  data = {key: known[key] for key in ('mean', 'std') if key in known}
  if 'crop_pct' in known:
    data['eval_crop'] = known['crop_pct']
  size = known.get('input_size')
  names = config.get('label_names')
  return {
    'data': data,
    **({'image_size': size[1:]} if size else {}),
    **({'class_names': names} if isinstance(names, list) else {}),
  }
