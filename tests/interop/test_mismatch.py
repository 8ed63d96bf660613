"""Files of other pretrainings: refused where their decoder means something else."""

import numpy as np
import pytest

from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.interop import importer
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
    with pytest.raises(UserError, match=r'take its encoder alone|partial=True') as error:
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
