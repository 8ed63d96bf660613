"""Building models by name, and what is said about mistakes."""

import dataclasses
import re

import pytest
from flax import nnx

import hivit_jax
from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.models.hivit import HiViT
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.ops.choice import choose
from tests.helpers import abstract_model


def test_models_are_listed():
  assert hivit_jax.list_models() == [
    'backbone_fast_itpn_base', 'backbone_fast_itpn_large', 'backbone_fast_itpn_small',
    'backbone_fast_itpn_tiny',
    'backbone_hivit_base', 'backbone_hivit_large', 'backbone_hivit_small', 'backbone_hivit_tiny',
    'backbone_itpn_base', 'backbone_itpn_large',
    'detect_hivit_base', 'detect_hivit_large', 'detect_hivit_small', 'detect_hivit_tiny',
    'detect_swin_base', 'detect_swin_small', 'detect_swin_tiny',
    'detect_vit_base', 'detect_vit_large',
    'fast_itpn_base', 'fast_itpn_large', 'fast_itpn_small', 'fast_itpn_tiny',
    'hivit_base', 'hivit_large', 'hivit_small', 'hivit_tiny',
    'mae_hivit_base', 'mae_hivit_large', 'mae_hivit_small', 'mae_hivit_tiny',
    'mae_itpn_base', 'mae_itpn_large', 'mae_vit_base', 'mae_vit_large',
    'segment_hivit_base', 'segment_hivit_large', 'segment_hivit_small', 'segment_hivit_tiny',
    'segment_swin_base', 'segment_swin_small', 'segment_swin_tiny',
    'segment_vit_base', 'segment_vit_large',
    'simmim_swin_base', 'simmim_swin_small', 'simmim_swin_tiny',
    'swin_base', 'swin_base_global', 'swin_base_mlp_stem', 'swin_base_three_stages',
    'swin_small', 'swin_tiny', 'vit_base', 'vit_large',
  ]  # fmt: skip


def test_overrides_go_before_the_variant():
  model = nnx.merge(*abstract_model('hivit_tiny', image_size=(16, 32), num_classes=3, embed_dim=48))
  assert isinstance(model, HiViT)
  assert model.grid == (1, 2)
  assert model.head.kernel.shape == (48, 3)
  assert (model.settings.depths, model.blocks[-1].attn.heads) == ((1, 1, 10), 6)
  model = nnx.merge(*abstract_model('mae_hivit_tiny', image_size=32))
  assert isinstance(model, MaskedAutoencoder)
  assert model.grid == (2, 2)


def _documented() -> dict[str, set[str]]:
  """Beginning of a name -> the settings that the help of `create_model` says it takes."""
  text = hivit_jax.create_model.__doc__.split('Settings of every model:')[1].split('Returns:')[0]
  every, families = re.split('Settings of a family.*', text)
  shared = set(re.findall(r'^    (\w+):', every, re.MULTILINE))
  taken: dict[str, list[str]] = {}
  for family, listed in re.findall(r'^    (\w+)_\*: (.*?)\.$', families, re.MULTILINE | re.DOTALL):
    listed = re.sub(r'\(.*?\)', '', listed, flags=re.DOTALL)
    like = re.match(r'as (\w+)_\* up to (\w+);', listed)
    start = [] if like is None else taken[like[1]][: taken[like[1]].index(like[2]) + 1]
    taken[family] = start + re.findall(r'\w+', listed[like.end() if like else 0 :])
  return {family: shared | set(own) for family, own in taken.items()}


def test_help_lists_what_each_family_takes():
  documented = _documented()
  for name, (_, settings) in models.MODELS.items():
    family = max((f for f in documented if name.startswith(f'{f}_')), key=len)
    assert documented[family] == {field.name for field in dataclasses.fields(settings)}, name


def test_the_variant_is_what_the_sizes_differ_in():
  assert models.variant('hivit_base') == {'embed_dim': 512, 'depths': (2, 2, 20), 'num_heads': 8}
  assert models.variant('swin_base_global')['global_stages'] == 1
  # Not what all SimMIMs have.
  assert set(models.variant('simmim_swin_base')) == {'embed_dim', 'depths', 'num_heads'}


@pytest.mark.parametrize(
  'name', ['mae_hivit_tiny', 'mae_vit_base', 'swin_tiny', 'segment_hivit_tiny']
)
def test_all_of_a_model_has_the_operations_asked_for(name):
  for options in ({}, {'attention': 'cudnn'}, {'ops': 'plain'}):
    model = nnx.merge(*abstract_model(name, **options))
    found = [module.ops for _, module in nnx.iter_modules(model) if hasattr(module, 'ops')]
    assert len(found) >= 10
    assert set(found) == {choose(**options)}


@pytest.mark.parametrize(
  ('name', 'overrides', 'message'),
  [
    ('hivit_bass', {}, 'unknown model "hivit_bass".*did you mean "hivit_base".*mae_hivit_tiny'),
    ('resnet', {}, 'unknown model "resnet".*hivit_tiny'),
    ('hivit_tiny', {'num_class': 5}, 'no argument "num_class".*did you mean "num_classes"'),
    ('hivit_tiny', {'mask_ratio': 0.5}, 'hivit_tiny has no argument "mask_ratio"'),
    ('hivit_tiny', {'rngs': 1}, 'no argument "rngs"'),
    ('hivit_tiny', {'attention': 'flash'}, 'attention="flash" is not one of auto, xla'),
    ('hivit_tiny', {'ops': 'slow'}, 'ops="slow" is not one of fast, plain'),
    ('hivit_tiny', {'ops': 'plain', 'attention': 'cudnn'}, 'attention=cudnn is a fast form'),
    ('hivit_tiny', {'image_size': 100}, 'multiples of 16 pixels, got 100x100'),
    ('hivit_tiny', {'image_size': (32, 40)}, 'multiples of 16 pixels, got 32x40'),
    ('hivit_tiny', {'image_size': 0}, 'image_size=0: expected a side'),
    ('hivit_tiny', {'image_size': 'wide'}, 'image_size=wide: expected a side or'),
    ('hivit_tiny', {'image_size': (64, 64, 3)}, 'expected a side or .height, width.'),
    ('hivit_tiny', {'dtype': 'bf16'}, "dtype='bf16': expected float32 or bfloat16"),
    ('hivit_tiny', {'dtype': 'int32'}, "dtype='int32': expected float32 or bfloat16"),
    ('hivit_tiny', {'num_classes': -1}, 'num_classes must be positive, or 0 for features, got -1'),
    ('hivit_tiny', {'depths': (1, 1)}, r'depths=\(1, 1\): expected 3 numbers'),
    ('hivit_tiny', {'stem_blocks': 2}, r'stem_blocks=2: expected 2 numbers'),
    ('swin_tiny', {'image_size': 48}, 'multiples of 32 pixels, got 48x48'),
    ('hivit_tiny', {'embed_dim': 90}, 'embed_dim must be a multiple of 4, got 90'),
    ('hivit_tiny', {'num_heads': 5}, 'num_heads=5 does not divide 384 channels'),
    ('hivit_tiny', {'drop_path_rate': 1.0}, 'drop_path_rate .* below 1, got 1.0'),
    ('hivit_tiny', {'drop_path_rate': -0.1}, 'drop_path_rate .* below 1, got -0.1'),
    ('mae_hivit_tiny', {'image_size': 16}, 'mask_ratio 0.75 keeps 0 of 1 units'),
    ('mae_hivit_tiny', {'target': 'hog'}, 'target="hog" is not one of pixels, saratrx, saratrx_v2'),
    ('mae_hivit_tiny', {'decoder_num_heads': 7}, 'decoder_num_heads=7 does not divide decoder_emb'),
    ('mae_hivit_tiny', {'decoder_embed_dim': 30}, 'decoder_embed_dim=30 is not a multiple of 4'),
    (
      'swin_tiny',
      {'scan': True},
      'swin_tiny has no argument "scan".*it takes: .*remat, window_size',
    ),
    ('simmim_swin_tiny', {'scan': False}, 'no argument "scan".*mask_ratio'),
    ('swin_tiny', {'num_heads': 3}, 'num_heads=3: expected one number for each stage'),
    ('hivit_tiny', {'dtype': None}, 'dtype=None: expected float32 or bfloat16'),
  ],
)
def test_mistakes_are_told_in_one_line(name, overrides, message):
  with pytest.raises(UserError, match=message) as caught:
    abstract_model(name, **overrides)
  assert '\n' not in str(caught.value)


def test_auto_attention_is_that_of_xla_without_a_gpu():
  model = hivit_jax.create_model('hivit_tiny', image_size=192, depths=(1, 1, 1), attention='auto')
  assert model.ops == choose()
