"""Every model that `create_model` can build, by name."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError, suggest
from hivit_jax.models.backbone import HiViTBackbone
from hivit_jax.models.hivit import HiViT
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.simmim import SimMIM
from hivit_jax.models.swin import Swin
from hivit_jax.models.vit import ViT, ViTMaskedAutoencoder
from hivit_jax.ops.choice import choose

# Table 1 of arXiv 2205.14949; large follows its scaling, the paper gives none.
_SIZES = {
  'tiny': {'embed_dim': 384, 'depths': (1, 1, 10), 'num_heads': 6},
  'small': {'embed_dim': 384, 'depths': (2, 2, 20), 'num_heads': 6},
  'base': {'embed_dim': 512, 'depths': (2, 2, 20), 'num_heads': 8},
  'large': {'embed_dim': 768, 'depths': (2, 2, 40), 'num_heads': 12},
}

# Table 5 of arXiv 2111.06377's ViT; Table 7 of arXiv 2103.14030.
_VIT = {
  'base': {'embed_dim': 768, 'depth': 12, 'num_heads': 12},
  'large': {'embed_dim': 1024, 'depth': 24, 'num_heads': 16},
}
_SWIN = {
  'tiny': {'embed_dim': 96, 'depths': (2, 2, 6, 2), 'num_heads': (3, 6, 12, 24)},
  'small': {'embed_dim': 96, 'depths': (2, 2, 18, 2), 'num_heads': (3, 6, 12, 24)},
  'base': {'embed_dim': 128, 'depths': (2, 2, 18, 2), 'num_heads': (4, 8, 16, 32)},
}

# The steps from Swin-B to HiViT-B, each on top of the one before: three stages, the main one with
# the two blocks of the fourth; global attention in it; no other attention. What is left to HiViT-B:
# two MLP blocks of ratio 3 for each of ratio 4, heads of 64 channels instead of 32, a position
# embedding, and the last LayerNorm after the mean.
_THREE_STAGES = {'embed_dim': 128, 'depths': (2, 2, 20), 'num_heads': (4, 8, 16)}
_GLOBAL = {**_THREE_STAGES, 'global_stages': 1}
_LADDER = {
  'three_stages': _THREE_STAGES,
  'global': _GLOBAL,
  'mlp_stem': {**_GLOBAL, 'mlp_stages': 2},
}

# name -> (class, arguments of this variant)
MODELS: dict[str, tuple[type[nnx.Module], dict[str, Any]]] = {
  **{f'hivit_{size}': (HiViT, arguments) for size, arguments in _SIZES.items()},
  **{f'backbone_hivit_{size}': (HiViTBackbone, arguments) for size, arguments in _SIZES.items()},
  **{f'mae_hivit_{size}': (MaskedAutoencoder, arguments) for size, arguments in _SIZES.items()},
  **{f'vit_{size}': (ViT, arguments) for size, arguments in _VIT.items()},
  **{f'mae_vit_{size}': (ViTMaskedAutoencoder, arguments) for size, arguments in _VIT.items()},
  **{f'swin_{size}': (Swin, arguments) for size, arguments in _SWIN.items()},
  **{f'swin_base_{step}': (Swin, arguments) for step, arguments in _LADDER.items()},
  **{f'simmim_swin_{size}': (SimMIM, arguments) for size, arguments in _SWIN.items()},
}


def list_models() -> list[str]:
  """Names that `create_model` accepts."""
  return sorted(MODELS)


def create_model(
  name: str, *, seed: int = 0, attention: str = 'xla', ops: str = 'fast', **overrides: Any
) -> Any:
  """Builds a model with freshly initialised parameters.

  Args:
    name: one of `list_models()`.
    seed: of the initialisation.
    attention, ops: see `ops.choice.choose`.
    **overrides: arguments of the model's class, instead of the variant's: `image_size` (one side
      or (height, width) in pixels), `num_classes`, `drop_path_rate`, `dtype`, ...

  Returns:
    A `flax.nnx.Module`.

  Raises:
    UserError: unknown name or argument.
    UserError: also for values that do not fit, such as a size that is not a multiple of 16.
  """
  if name not in MODELS:
    raise UserError(
      f'unknown model "{name}"{suggest(name, MODELS)}; known: {", ".join(list_models())}'
    )
  cls, arguments = MODELS[name]
  chosen = choose(ops, attention)
  accepted = set(inspect.signature(cls.__init__).parameters) - {'self', 'rngs'}
  for key in overrides:
    if key not in accepted:
      raise UserError(
        f'{name} has no argument "{key}"{suggest(key, accepted)}; it takes: '
        + ', '.join(sorted(accepted | {'attention', 'ops'}))
      )
  arguments = {**arguments, **overrides}
  for key in ('image_size', 'bias_image_size'):
    if arguments.get(key) is not None:
      arguments[key] = _size(key, arguments[key])
  _check_dtype(arguments.get('dtype', jnp.float32))
  build: Any = cls
  model = build(**arguments, rngs=nnx.Rngs(seed))
  model.set_attributes(ops=chosen)
  return model


def _size(key: str, value: Any) -> tuple[int, int]:
  """(height, width) from one side or two."""
  sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
  if len(sides) != 2 or not all(isinstance(side, int | np.integer) for side in sides):
    raise UserError(f'{key}={value!r}: expected one side or (height, width), in pixels, as numbers')
  return int(sides[0]), int(sides[1])


def _check_dtype(dtype: Any) -> None:
  try:
    known = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    known = False
  if not known:
    raise UserError(f'dtype={dtype!r}: expected float32 or bfloat16')
