"""Files of other pretrainings: refused where their decoder means something else."""

import re

import numpy as np
import pytest
from flax import nnx

from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.interop import files, importer, infer
from hivit_jax.interop.files import StateDict
from tests.helpers import TINY, TINY_MAE
from tests.interop_files import golden_state


def _saratrx() -> dict:
  """Its targets are constants in the file; all other names and shapes are those of HiViT's MAE."""
  masks = {f'sarfeature{i}.weight_x1': np.zeros((1, 1, 3, 3), np.float32) for i in (1, 2, 3)}
  return golden_state('mae_hifeat_normpix') | masks


def _itpn() -> dict:
  """Its decoder has the names of HiViT's, but for the first layer, which reads a pyramid."""
  state = golden_state('mae_hifeat_normpix')
  pyramid = {
    f'decoder_embed.{i}.1.{leaf}': value
    for i in range(3)
    for leaf, value in (('weight', state['decoder_embed.weight']), ('bias', np.zeros(16)))
  }
  pyramid['align_dim_16to8.weight'] = np.zeros((8, 8), np.float32)
  return {k: v for k, v in state.items() if 'decoder_embed' not in k} | pyramid


@pytest.mark.parametrize('partial', [False, True])
@pytest.mark.parametrize(
  ('state', 'reason'),
  [
    (_saratrx, r'its decoder predicts gradient features of SAR images, not pixels .sarfeature'),
    (_itpn, r'its decoder reads the feature pyramid of iTPN .decoder_embed\.0'),
  ],
)
def test_the_decoder_of_another_pretraining_is_refused_and_its_encoder_taken(
  state, reason, partial
):
  mae = models.create_model('mae_hivit_tiny', **TINY_MAE)
  before = np.asarray(mae.absolute_pos_embed[...])
  with pytest.raises(UserError, match=reason):
    importer.load_into(mae, StateDict(state(), 'FILE', {}), partial=partial)
  np.testing.assert_array_equal(mae.absolute_pos_embed[...], before)
  classifier = models.create_model('hivit_tiny', **TINY, num_classes=3)
  if not partial:
    with pytest.raises(UserError, match=r'load only its encoder|partial=True') as error:
      importer.load_into(classifier, StateDict(state(), 'FILE', {}))
    assert 'mae_hivit' not in str(error.value)
    return
  importer.load_into(classifier, StateDict(state(), 'FILE', {}), partial=True)
  np.testing.assert_array_equal(
    classifier.absolute_pos_embed[...], golden_state('mae_hifeat_normpix')['absolute_pos_embed']
  )


def test_a_decoder_is_taken_as_a_whole_or_not_at_all():
  state = golden_state('mae_hifeat_normpix')
  shallow = models.create_model('mae_hivit_tiny', **(TINY_MAE | {'decoder_depth': 1}))
  with pytest.raises(UserError, match='create the model with decoder_depth=2, not 1'):
    importer.load_into(shallow, StateDict(state, 'FILE', {}), partial=True)
  cut = {name: value for name, value in state.items() if name != 'decoder_norm.bias'}
  mae = models.create_model('mae_hivit_tiny', **TINY_MAE)
  with pytest.raises(UserError, match=r'another decoder .* what differs: decoder_norm\.bias'):
    importer.load_into(mae, StateDict(cut, 'FILE', {}), partial=True)
  bare = {name: value for name, value in state.items() if not name.startswith('decoder')}
  report = importer.load_into(mae, StateDict(bare, 'FILE', {}), partial=True)
  assert {name.split('.')[0] for name in report.new} == {
    'decoder_embed', 'decoder_blocks', 'decoder_norm', 'decoder_pred', 'decoder_pos_embed'
  }  # fmt: skip
  assert 'mask_token' in report.loaded


def _renamed(state: dict, pattern: str, replacement: str) -> dict:
  return {re.sub(pattern, replacement, name): value for name, value in state.items()}


def _fast_itpn() -> dict:
  return files.normal_names(golden_state('fast_itpn'))


@pytest.mark.parametrize(
  ('state', 'likeliest', 'difference'),
  [
    # Fast-iTPN with patches of another side is no ViT, although it has a pos_embed.
    (
      lambda: _fast_itpn() | {'patch_embed.proj.weight': np.zeros((8, 3, 8, 8))},
      'Fast-iTPN',
      'patches of 8x8 pixels, not 4x4',
    ),
    (
      lambda: {k: v for k, v in _fast_itpn().items() if 'reduction' not in k},
      'Fast-iTPN',
      r'0 merges \(blocks.N.reduction.weight\), not 2',
    ),
    (lambda: _renamed(golden_state('hivit_norpe'), 'absolute_', 'other_'), 'HiViT', 'no absolute'),
    (
      lambda: golden_state('hivit_norpe') | {'absolute_pos_embed': np.zeros((1, 16, 48))},
      'HiViT',
      'its stages have 8, 48 channels',
    ),
    (
      lambda: _renamed(golden_state('vit_mae'), r'mlp.fc1', 'mlp.w12'),
      "ViT's MAE",
      'no blocks.0.mlp.fc1.weight',
    ),
    (lambda: _renamed(golden_state('swin'), 'bias_table', 'mlp'), 'Swin', 'no relative_position_b'),
  ],
)
def test_a_file_of_no_known_layout_names_the_three_likeliest_and_what_differs(
  state, likeliest, difference
):
  with pytest.raises(UserError) as error:
    infer.describe(state(), 'FILE', num_heads=4)
  text = str(error.value)
  assert '\n' not in text
  start = 'FILE is none of the layouts known here. The likeliest, and what differs: '
  assert text.startswith(f'{start}{likeliest} (')
  assert re.search(difference, text.removeprefix(start).split('; ')[0]), text
  assert len(text.removeprefix(start).split('; ')) == 3


def test_a_resnet_is_nothing_that_is_here():
  state = {'conv1.weight': np.zeros((64, 3, 7, 7)), 'fc.weight': np.zeros((10, 512))}
  with pytest.raises(UserError, match=r'none of the layouts known here.*no patch_embed\.proj'):
    infer.describe(state, 'FILE')


def test_an_autoencoder_continues_from_an_encoder_alone_with_a_new_decoder():
  state = {k: v for k, v in golden_state('mae_hifeat_normpix').items() if 'decoder' not in k}
  state.pop('mask_token')
  abstract = nnx.eval_shape(lambda: models.create_model('mae_hivit_tiny', **TINY_MAE))
  values, report = importer.fit(abstract, StateDict(state, 'FILE', {}), partial=True)
  assert report.dropped == []
  assert {name.split('.')[0].split('_')[0] for name in report.new} == {'decoder', 'mask'}
  assert len(values) == len(state)
