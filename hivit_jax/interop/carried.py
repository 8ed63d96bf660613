"""The model that weights carry: in a run's checkpoint, a conversion, or a file exported here."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from hivit_jax import settings
from hivit_jax.errors import UserError
from hivit_jax.interop import infer
from hivit_jax.interop.files import StateDict
from hivit_jax.interop.infer import Described
from hivit_jax.models import MODELS, targets

# Of pixels in [0, 1]: what weights that say nothing else were trained with.
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
# Mean and standard deviation of grey pixels, by the target that is computed from them.
_PIXELS = {targets.SARATRX: (0.0, 1.0), targets.SARATRX_V2: (0.2109, 0.2178)}

_log = logging.getLogger(__name__)


def model_of(state: StateDict, **overrides: Any) -> Described:
  """The model that weights are for.

  Runs, conversions and files exported here carry their model, which is taken as it is. For files
  of other code, names and shapes decide, and one warning says what had to be guessed.

  Args:
    state: the weights.
    **overrides: arguments that win over what the weights say.

  Returns:
    The model. If the weights carry it, it has every argument of its class except
    `infer.COMPUTATION`, which the user chooses.

  Raises:
    UserError: see `infer.describe`.
  """
  if 'image_size' in overrides:
    overrides['image_size'] = settings.image_size(overrides['image_size'], 'image_size')
  carried = read(state.metadata)
  if carried is None:
    known = infer.known_size(state.metadata) | overrides
    described = infer.describe(state.arrays, state.source, **known)
  else:
    guessed = tuple(key for key in carried.guessed if key not in overrides)
    described = Described(carried.name, carried.arguments | overrides, guessed)
  if described.guessed:
    key = described.guessed[0]
    _log.warning(
      '%s does not say %s. To set another value: create_model(%s=...), --%s=... of tools.convert, '
      'or --config.model.%s=...',
      state.source,
      ', '.join(f'{key} (assumed {described.arguments[key]})' for key in described.guessed),
      key, key, key,
    )  # fmt: skip
  return described


def as_classifier(described: Described) -> Described:
  """The classifier of an encoder alone, which then has a head of its own; others stay."""
  name = described.name.removeprefix('backbone_')
  accepted = infer.defaults(name)
  if name == described.name or not accepted:
    return described
  arguments = {key: value for key, value in described.arguments.items() if key in accepted}
  return described._replace(name=name, arguments=arguments)


def pixels(state: StateDict, described: Described) -> dict[str, Any]:
  """Pixel statistics that weights were trained with: what they carry, or what their code has.

  {} for files of other code that has ImageNet's.
  """
  if known := infer.pixels(state.metadata):
    return known
  if 'model' in state.metadata or 'config' in state.metadata:
    return {}
  arguments = described.arguments
  mean, std = _PIXELS.get(arguments.get('target', ''), (None, None))
  if described.name.split('_')[-2] == 'hivit' and arguments.get('layer_scale'):
    mean, std = 0.5, 0.5  # iTPN-CLIP
  channels = arguments['channels']
  return {} if mean is None else {'mean': (mean,) * channels, 'std': (std,) * channels}


def statistics(state: StateDict, described: Described) -> dict[str, tuple[float, ...]]:
  """`mean` and `std` of each channel, ImageNet's where the weights say nothing else."""
  known = pixels(state, described)
  return {key: tuple(known.get(key, value)) for key, value in IMAGENET.items()}


def of_model(model: Any) -> Described:
  """The description of a model from `create_model`, with every argument except `COMPUTATION`.

  Raises:
    UserError: its class is none of `models`.
  """
  names = [name for name, (cls, _) in MODELS.items() if cls is type(model)]
  if not names:
    raise UserError(f'{type(model).__name__} is none of the models of hivit_jax.list_models()')
  own = dataclasses.asdict(model.settings)
  arguments = {key: value for key, value in own.items() if key not in infer.COMPUTATION}
  return Described(infer.nearest(names, arguments), arguments)


def read(metadata: Mapping[str, Any]) -> Described | None:
  """The model in the metadata of a conversion or file (`model`) or of a run (`config`), if any."""
  guessed: tuple[str, ...] = ()
  if 'model' in metadata:
    name, own = metadata['model']['name'], dict(metadata['model'].get('arguments', {}))
    guessed = tuple(metadata['model'].get('guessed', ()))
    # Older conversions do not have them.
    guessed += tuple(k for k in infer.INVISIBLE if k in infer.defaults(name) and k not in own)
  elif metadata.get('config', {}).get('model', {}).get('name'):
    config = metadata['config']
    name = config['model']['name']
    own = {key: value for key, value in config['model'].items() if value is not None}
    own['channels'] = config.get('channels', 3)
  else:
    return None
  left_out = infer.COMPUTATION | {'name'}
  own = infer.tuples({key: value for key, value in own.items() if key not in left_out})
  return Described(name, infer.defaults(name) | own | infer.known_size(metadata), guessed)


def metadata(described: Described, state: StateDict, **more: Any) -> dict[str, Any]:
  """What a file or conversion carries beside its arrays, for JSON; `read` understands it.

  Args:
    described: the model that the arrays are for.
    state: where they come from: its pixel statistics and class names are carried on.
    **more: further entries.
  """
  return {
    'model': described._asdict(),
    'image_size': described.arguments['image_size'],
    'data': pixels(state, described),
    'class_names': state.metadata.get('class_names'),
    **more,
  }
