"""Size and work of the models."""

import json

import jax
import pytest

from hivit_jax.errors import UserError
from hivit_jax.planning.flops import matmul_flops, matmul_outputs
from hivit_jax.tools import sizes
from tests.helpers import TINY, TINY_MAE
from tests.runs import error_of

# GMACs at 224 pixels as published (HiViT: table 1 of arXiv 2205.14949; Swin: 2103.14030). Counters
# differ in what they count besides products.
PUBLISHED = {
  'hivit_tiny': 4.60, 'hivit_small': 9.07, 'hivit_base': 15.85, 'hivit_large': 63.9,
  'swin_tiny': 4.5, 'swin_small': 8.7, 'swin_base': 15.4, 'vit_base': 17.6,
}  # fmt: skip
_SWIN = {'image_size': 64, 'embed_dim': 32, 'depths': (2, 2), 'num_heads': (2, 4), 'window_size': 4}
_VIT = {'image_size': 64, 'embed_dim': 64, 'depth': 2, 'num_heads': 4}
SMALL = {
  'hivit_tiny': TINY | {'embed_dim': 64},
  'mae_hivit_tiny': TINY_MAE | {'embed_dim': 64},
  'vit_base': _VIT,
  'mae_vit_base': _VIT | {'decoder_embed_dim': 32, 'decoder_depth': 1, 'decoder_num_heads': 2},
  'swin_tiny': _SWIN,
  'simmim_swin_tiny': _SWIN | {'mask_ratio': 0.5},
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_work_is_the_published(name):
  assert sizes.summary(name)['gmacs'] == pytest.approx(PUBLISHED[name], rel=0.007)


@pytest.mark.parametrize('name', SMALL)
def test_work_is_what_is_compiled(name):
  """The compiler counts elementwise work, too: some more than the products."""
  function, args = sizes.forward(name, **SMALL[name])
  compiled = jax.jit(function).lower(*args).compile().cost_analysis()['flops']
  assert 1 <= compiled / matmul_flops(function, *args) < 1.3


def test_activations_are_the_elements_of_the_products_results():
  a, b = (jax.ShapeDtypeStruct(shape, 'float32') for shape in ((3, 5), (5, 7)))
  assert matmul_outputs(lambda a, b: (a @ b) @ b.T, a, b) == 3 * 7 + 3 * 5


def test_masking_saves_three_quarters_of_the_encoder():
  whole, masked = (
    sizes.summary('mae_hivit_base', decoder_depth=1, decoder_embed_dim=16, mask_ratio=ratio)
    for ratio in (0.01, 0.75)
  )
  assert 0.2 < masked['gmacs'] / whole['gmacs'] < 0.3


def test_as_a_table_and_as_json(forks):
  command = ('hivit_jax/tools/summarize.py', '--image_size=96,192', '--models=hivit_tiny,vit_base')
  header, _, *rows = forks(*command).stdout.splitlines()
  assert header.count('|') == 6
  assert [row.split('|')[1].strip() for row in rows] == ['hivit_tiny', 'vit_base']
  assert all('| 96x192 |' in row for row in rows)
  rows = [json.loads(line) for line in forks(*command, '--json').stdout.splitlines()]
  assert rows == [sizes.summary(name, image_size=(96, 192)) for name in ('hivit_tiny', 'vit_base')]


@pytest.mark.parametrize('size', ['224', '384', '96,192'])
def test_windows_follow_the_size(forks, size):
  names = 'swin_tiny,simmim_swin_tiny'
  done = forks('hivit_jax/tools/summarize.py', f'--image_size={size}', f'--models={names}')
  assert done.status == 0, done.stderr
  assert done.stdout.count('| swin_tiny |') == done.stdout.count('| simmim_swin_tiny |') == 1


def test_mistakes(forks):
  tool = 'hivit_jax/tools/summarize.py'
  assert '--image_size=a: expected a side' in error_of(forks(tool, '--image_size=a'))
  assert 'unknown model "swim_base" (did you mean' in error_of(forks(tool, '--models=swim_base'))
  assert 'multiples of 16' in error_of(forks(tool, '--models=hivit_tiny', '--image_size=100'))
  with pytest.raises(UserError):
    sizes.summary('hivit_tiny', image_size=(1, 1))
