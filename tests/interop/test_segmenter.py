"""Segmenters to and from mmsegmentation's files, heads included."""

import jax
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.interop import exporter, files, importer, infer
from hivit_jax.interop.files import StateDict
from tests.helpers import TINY_MAE, abstract_model, assert_close, load_golden, random_model

CONFIG, ARRAYS = load_golden('segmentation_model.npz')
OFFICIAL = {k.removeprefix('param/'): v for k, v in ARRAYS.items() if k.startswith('param/')}


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A file as mmsegmentation saves it."""
  counters = {
    name.replace('running_var', 'num_batches_tracked'): np.array(7, np.int64)
    for name in OFFICIAL
    if name.endswith('running_var')
  }
  path = tmp_path_factory.mktemp('segmenter') / 'iter_80000.pth'
  files.write(path, OFFICIAL | counters, wrapped_in='state_dict')
  return path


def test_a_file_tells_its_model_and_the_model_gives_the_published_logits(published):
  model = hivit_jax.create_model(weights=published)
  settings = model.settings
  assert settings.image_size == (96, 96)
  assert settings.position_image_size == (64, 64)
  assert (settings.embed_dim, settings.depths, settings.num_heads) == (32, (1, 1, 2), 4)
  assert (settings.num_classes, settings.head_channels, settings.auxiliary_channels) == (6, 16, 8)
  images = ARRAYS['image_nchw'].transpose(0, 2, 3, 1)
  logits = nnx.jit(lambda model, x: model(x))(model, images)
  assert_close(np.moveaxis(logits, -1, 1), ARRAYS['eval/logits'], relative=5e-5)


def test_tables_are_resized_to_the_crops_as_the_official_code_does(published):
  """From the 4x4 units of the checkpoint to 6x6, at load."""
  smaller = dict(OFFICIAL)
  for name, value in ARRAYS.items():
    if name.startswith('checkpoint/'):
      smaller[f'backbone.{name.removeprefix("checkpoint/")}'] = value
  state = StateDict(files.normal_names(smaller), 'the file', {'image_size': (64, 64)})
  model = hivit_jax.create_model(weights=published)
  report = importer.load_into(model, state)
  assert len(report.resized) == 2
  block = model.backbone.blocks[-1]
  assert_close(
    block.attn.relative_position_bias_table[...],
    OFFICIAL['backbone.blocks.7.attn.relative_position_bias_table'],
    relative=1e-6,
  )


def test_exported_names_are_the_official_ones_and_values_come_back(published, tmp_path):
  model = hivit_jax.create_model(weights=published)
  exported = exporter.state_dict(model)
  counters = {name for name in exported if name.endswith('num_batches_tracked')}
  assert exported.keys() - counters == OFFICIAL.keys()
  assert len(counters) == sum(name.endswith('running_var') for name in OFFICIAL)
  for name, value in OFFICIAL.items():
    np.testing.assert_array_equal(exported[name], value, err_msg=name)
  path = tmp_path / 'ours.pth'
  files.write(path, exported, wrapped_in='state_dict')
  again = hivit_jax.create_model(weights=path)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_its_encoder_alone_is_the_backbone_of_the_same_sizes(published):
  model = hivit_jax.create_model(weights=published)
  state = files.read(published)
  arrays = exporter.in_layout(state, 'backbone')
  assert not any('head' in name for name in arrays)
  described = infer.describe(files.normal_names(arrays), 'it', num_heads=4)
  assert described.name.startswith('backbone_hivit')
  assert described.arguments['image_size'] == (64, 64)
  assert described.arguments['bias_image_size'] == (96, 96)
  backbone = nnx.merge(*abstract_model(described.name, **described.arguments))
  importer.load_into(backbone, StateDict(files.normal_names(arrays), 'it', {}))
  images = ARRAYS['image_nchw'][:1].transpose(0, 2, 3, 1)
  for one, two in zip(backbone(images), model.backbone(images), strict=True):
    np.testing.assert_array_equal(one, two)


def test_a_pretrained_encoder_without_tables_begins_a_segmenter():
  mae = nnx.merge(*random_model('mae_hivit_tiny', **TINY_MAE, rpe=False))
  state = StateDict(exporter.named_arrays(nnx.to_pure_dict(nnx.state(mae))), 'the MAE', {})
  model = hivit_jax.create_model(
    'segment_hivit_tiny', image_size=96, position_image_size=64, embed_dim=32, depths=(1, 1, 2),
    num_heads=4, num_classes=3, head_channels=8, auxiliary_channels=4,
  )  # fmt: skip
  report = importer.load_into(model, state, partial=True)
  assert len(report.zeroed) == 2
  assert all('head.' in name or name in report.zeroed for name in report.new)
  assert all(name.startswith(('decoder', 'mask_token', 'norm')) for name in report.dropped)
  np.testing.assert_array_equal(model.backbone.absolute_pos_embed[...], mae.absolute_pos_embed[...])


def test_a_segmenter_of_other_classes_keeps_all_but_its_classifiers(published):
  model = hivit_jax.create_model(weights=published, partial=True, num_classes=4)
  assert model(ARRAYS['image_nchw'][:1].transpose(0, 2, 3, 1)).shape == (1, 24, 24, 4)
  state = files.read(published)
  with pytest.raises(UserError, match=r'decode_head\.conv_seg\.weight is'):
    importer.load_into(model, state)
  report = importer.load_into(model, state, partial=True)
  assert sorted(report.new) == [
    f'{head}_head.conv_seg.{leaf}'
    for head in ('auxiliary', 'decode')
    for leaf in ('bias', 'weight')
  ]
