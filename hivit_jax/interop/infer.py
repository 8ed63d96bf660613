"""Which model a state dict belongs to, inferred from its names and shapes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hivit_jax import settings
from hivit_jax.errors import UserError
from hivit_jax.interop import detector, likeliest, segmenter, shapes
from hivit_jax.interop.shapes import KINDS, architecture, family
from hivit_jax.models import MODELS, settings_of

_PRETRAINED_DECODER_HEADS = 16
# Arguments that no shape shows, beside numbers of heads.
INVISIBLE = ('mask_ratio', 'norm_pix_loss')
# Arguments that change how a model is computed, not what: they are the user's, not the weights'.
COMPUTATION = frozenset(('dtype', 'attention', 'ops', 'remat', 'scan'))


# Architecture -> what tells its arguments, side of its patches.
_TELL = {
  'hivit': (shapes.hivit, 4),
  'itpn': (shapes.itpn, 4),
  'fast_itpn': (shapes.fast_itpn, 4),
  'vit': (shapes.vit, 16),
  'swin': (shapes.swin, 4),
}


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


def pixels(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """`mean`, `std`, `dtype` and `eval_crop` (see configs/base.py) in a metadata, if any."""
  told = metadata.get('data') or metadata.get('config', {}).get('data', {})
  return {key: told[key] for key in ('mean', 'std', 'dtype', 'eval_crop') if key in told}


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
    **known: arguments that shapes do not show, above all `num_heads` if heads do not have 64
      channels, and `image_size` if images were not square.

  Returns:
    The model. Of ViT and Swin without a head it is the classifier, whose encoder it is.

  Raises:
    UserError: it is none of the models here, or an argument cannot be inferred.
  """
  kind, base = family(arrays), architecture(arrays)
  tell, patch = _TELL[base]
  shape = {name: tuple(value.shape) for name, value in arrays.items()}
  told = {key: known.pop(key, None) for key in ('num_heads', 'decoder_num_heads', 'image_size')}
  try:
    sides = shape['patch_embed.proj.weight'][2:]
    if sides != (patch, patch):
      raise KeyError('patches')
    size = told['image_size']
    resized = kind in ('segmenter', 'detector') and base != 'swin'
    own = known.pop('position_image_size', None) if resized else size
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
      embed = shapes.ITPN_EMBED if base == 'itpn' else 'decoder_embed.weight'
      arguments |= {
        'decoder_embed_dim': shape[embed][0],
        'decoder_depth': 1 + shapes.last(shape, r'decoder_blocks\.(\d+)\.'),
        'decoder_num_heads': told['decoder_num_heads'] or _PRETRAINED_DECODER_HEADS,
        'target': shapes.target(shape),
      }
  except UserError:
    raise
  except (KeyError, IndexError, ValueError):
    raise UserError(
      f'{source} is none of the layouts known here. The likeliest, and what differs: '
      + likeliest.three(shape)
    ) from None
  if kind == 'backbone' and base in ('vit', 'swin'):
    kind = 'classifier'
  name = _name(KINDS[kind][1] + base, arguments, source)
  guessed = []
  if (
    not told['num_heads']
    and base != 'swin'
    and not any(key.endswith(shapes.TABLE) for key in shape)
  ):
    guessed.append('num_heads')
  if kind == 'mae' and not told['decoder_num_heads']:
    guessed.append('decoder_num_heads')
  if kind == 'detector' and base != 'swin':
    guessed += [key for key in detector.GUESSED if key not in known]
    arguments = {key: defaults(name)[key] for key in detector.GUESSED} | arguments
  invisible = {key: value for key, value in defaults(name).items() if key in INVISIBLE}
  guessed += [key for key in invisible if key not in known]
  return Described(name, arguments | invisible | known, tuple(guessed))


def with_pyramid(described: Described, arrays: Mapping[str, np.ndarray], source: str) -> Described:
  """The backbone of iTPN that has the pyramid in `arrays` on top of a described encoder."""
  told = shapes.pyramid({name: value.shape for name, value in arrays.items()})
  accepted = defaults('backbone_itpn_base')
  arguments = {k: v for k, v in (described.arguments | told).items() if k in accepted}
  return described._replace(name=_name('backbone_itpn', arguments, source), arguments=arguments)


def _name(family_name: str, arguments: Mapping[str, Any], source: str) -> str:
  names = [name for name in MODELS if name.rsplit('_', 1)[0] == family_name]
  if not names:
    raise UserError(f'{source} is a {family_name}, and there is no such model here')
  return nearest(names, arguments)


def nearest(names: Sequence[str], arguments: Mapping[str, Any]) -> str:
  """The registered model of the same width and, if possible, depth and other arguments."""

  def depths(arguments: Mapping[str, Any]) -> Sequence[int]:
    return arguments.get('depths') or (arguments['depth'],)

  def distance(name: str) -> tuple:
    own = settings_of(name)
    pairs = itertools.zip_longest(depths(own), depths(arguments), fillvalue=0)
    return (
      own['embed_dim'] != arguments['embed_dim'],
      sum(abs(a - b) for a, b in pairs),
      sum(value != own.get(key) for key, value in arguments.items()),
    )

  return min(names, key=distance)
