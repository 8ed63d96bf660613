"""Every model that `create_model` can build, by name."""

import dataclasses
from typing import Any

from flax import nnx

from hivit_jax.errors import UserError, suggest
from hivit_jax.models.backbone import BackboneSettings, HiViTBackbone
from hivit_jax.models.detector_settings import (
  MaskRCNNSettings,
  SwinMaskRCNNSettings,
  ViTMaskRCNNSettings,
)
from hivit_jax.models.encoder import Settings
from hivit_jax.models.fast_itpn import (
  FastITPN,
  FastITPNBackbone,
  FastITPNBackboneSettings,
  FastITPNClassifierSettings,
)
from hivit_jax.models.hivit import HiViT, HiViTClassifierSettings
from hivit_jax.models.itpn import (
  ITPNBackbone,
  ITPNBackboneSettings,
  ITPNMAESettings,
  ITPNMaskedAutoencoder,
)
from hivit_jax.models.mae import HiViTMAESettings, HiViTMaskedAutoencoder
from hivit_jax.models.mask_rcnn import MaskRCNN, SwinMaskRCNN, ViTMaskRCNN
from hivit_jax.models.segmenter_settings import (
  SegmenterSettings,
  SwinSegmenterSettings,
  ViTSegmenterSettings,
)
from hivit_jax.models.simmim import SimMIM, SimMIMSettings
from hivit_jax.models.swin import Swin, SwinClassifierSettings
from hivit_jax.models.upernet import Segmenter
from hivit_jax.models.vit import ViT, ViTClassifierSettings, ViTMAESettings, ViTMaskedAutoencoder
from hivit_jax.ops import initializers
from hivit_jax.ops.choice import choose

_Sizes = dict[str, dict[str, Any]]

# Table 1 of arXiv 2205.14949; large follows its scaling, the paper gives none.
_HIVIT: _Sizes = {
  'tiny': {'embed_dim': 384, 'depths': (1, 1, 10), 'num_heads': 6},
  'small': {'embed_dim': 384, 'depths': (2, 2, 20), 'num_heads': 6},
  'base': {'embed_dim': 512, 'depths': (2, 2, 20), 'num_heads': 8},
  'large': {'embed_dim': 768, 'depths': (2, 2, 40), 'num_heads': 12},
}

# Transformer blocks that attend globally in detectors: the published base has every fifth. Large,
# twice as deep, has as many.
_DETECT: _Sizes = {
  size: {**own, 'global_blocks': blocks}
  for (size, own), blocks in zip(
    _HIVIT.items(), ((4, 9), (4, 9, 14, 19), (4, 9, 14, 19), (9, 19, 29, 39)), strict=True
  )
}
# The authors' models of the names.
_ITPN: _Sizes = {
  'base': {'embed_dim': 512, 'depths': (2, 2, 24), 'stem_blocks': (3, 3), 'num_heads': 8},
  'large': {'embed_dim': 768, 'depths': (1, 1, 40), 'num_heads': 12},
}
# Here `depths` are blocks, not pairs of them.
_FAST_ITPN: _Sizes = {
  'tiny': {'embed_dim': 384, 'depths': (1, 1, 12), 'num_heads': 6},
  'small': {'embed_dim': 384, 'depths': (2, 2, 20), 'num_heads': 6},
  'base': {'embed_dim': 512, 'depths': (3, 3, 24), 'num_heads': 8},
  'large': {'embed_dim': 768, 'depths': (2, 2, 40), 'num_heads': 12},
}

# Table 5 of arXiv 2111.06377's ViT.
_VIT: _Sizes = {
  'base': {'embed_dim': 768, 'depth': 12, 'num_heads': 12},
  'large': {'embed_dim': 1024, 'depth': 24, 'num_heads': 16},
}
# ViTDet (arXiv 2203.16527): the last block of each quarter attends globally.
_DETECT_VIT: _Sizes = {
  size: {**own, 'global_blocks': tuple(own['depth'] // 4 * i - 1 for i in range(1, 5))}
  for size, own in _VIT.items()
}
# Table 7 of arXiv 2103.14030.
_SWIN: _Sizes = {
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
_LADDER: _Sizes = {
  'three_stages': _THREE_STAGES,
  'global': _GLOBAL,
  'mlp_stem': {**_GLOBAL, 'mlp_stages': 2},
}

# Beginning of the name, class, its settings, sizes.
_FAMILIES: tuple[tuple[str, type[nnx.Module], type[Settings], _Sizes], ...] = (
  ('hivit', HiViT, HiViTClassifierSettings, _HIVIT),
  ('backbone_hivit', HiViTBackbone, BackboneSettings, _HIVIT),
  ('detect_hivit', MaskRCNN, MaskRCNNSettings, _DETECT),
  ('detect_vit', ViTMaskRCNN, ViTMaskRCNNSettings, _DETECT_VIT),
  ('segment_hivit', Segmenter, SegmenterSettings, _HIVIT),
  ('mae_hivit', HiViTMaskedAutoencoder, HiViTMAESettings, _HIVIT),
  ('backbone_itpn', ITPNBackbone, ITPNBackboneSettings, _ITPN),
  ('mae_itpn', ITPNMaskedAutoencoder, ITPNMAESettings, _ITPN),
  ('fast_itpn', FastITPN, FastITPNClassifierSettings, _FAST_ITPN),
  ('backbone_fast_itpn', FastITPNBackbone, FastITPNBackboneSettings, _FAST_ITPN),
  ('vit', ViT, ViTClassifierSettings, _VIT),
  ('mae_vit', ViTMaskedAutoencoder, ViTMAESettings, _VIT),
  ('swin', Swin, SwinClassifierSettings, _SWIN),
  ('swin_base', Swin, SwinClassifierSettings, _LADDER),
  ('detect_swin', SwinMaskRCNN, SwinMaskRCNNSettings, _SWIN),
  ('segment_vit', Segmenter, ViTSegmenterSettings, _VIT),
  ('segment_swin', Segmenter, SwinSegmenterSettings, _SWIN),
  ('simmim_swin', SimMIM, SimMIMSettings, _SWIN),
)

# name -> (class, settings)
MODELS: dict[str, tuple[type[nnx.Module], Settings]] = {
  f'{family}_{size}': (cls, settings(**own))
  for family, cls, settings, sizes in _FAMILIES
  for size, own in sizes.items()
}


def list_models() -> list[str]:
  """Names that `create_model` accepts."""
  return sorted(MODELS)


def settings_of(name: str) -> dict[str, Any]:
  """All settings of a named model."""
  settings = MODELS[name][1]
  return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def variant(name: str) -> dict[str, Any]:
  """What distinguishes a named model from the others of its family: size, depth, heads."""
  fields = {field.name: field for field in dataclasses.fields(MODELS[name][1])}
  return {key: value for key, value in settings_of(name).items() if value != fields[key].default}


def create_model(
  name: str, *, seed: int = 0, attention: str = 'xla', ops: str = 'fast', **overrides: Any
) -> Any:
  """Builds a model with freshly initialised parameters; see `hivit_jax.create_model`."""
  if name not in MODELS:
    raise UserError(
      f'unknown model "{name}"{suggest(name, MODELS)}; known: {", ".join(list_models())}'
    )
  cls, preset = MODELS[name]
  chosen = choose(ops, attention)
  accepted = settings_of(name)
  for key in overrides:
    if key not in accepted:
      raise UserError(
        f'{name} has no argument "{key}"{suggest(key, accepted)}; it takes: '
        + ', '.join(sorted({*accepted, 'attention', 'ops'}))
      )
  build: Any = cls
  model = build(dataclasses.replace(preset, **overrides), rngs=initializers.keys(seed))
  model.set_attributes(ops=chosen)
  return model
