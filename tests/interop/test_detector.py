"""Detectors to and from mmdetection's files, heads included."""

import jax
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.interop import carried, exporter, files, importer, infer
from hivit_jax.interop.files import StateDict
from tests.helpers import TINY_MAE, TINY_SWIN, abstract_model, load_golden, random_model
from tests.models.test_mask_rcnn import DETECTOR, last

CONFIG, ARRAYS = load_golden('detection_postprocess.npz')
OFFICIAL = {k.removeprefix('param/'): v for k, v in ARRAYS.items() if k.startswith('param/')}
# What names and shapes do not show.
UNSEEN = {
  'num_heads': 4,
  'window_size': 4,
  'global_blocks': (1,),
  'nms_pre': (100, 100),
  'proposals': 40,
  'detections': 12,
}


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A file as mmdetection saves it."""
  counters = {
    name.replace('running_var', 'num_batches_tracked'): np.array(7, np.int64)
    for name in OFFICIAL
    if name.endswith('running_var')
  }
  path = tmp_path_factory.mktemp('detector') / 'epoch_36.pth'
  files.write(path, OFFICIAL | counters, wrapped_in='state_dict')
  return path


def test_a_file_tells_its_model_and_the_model_finds_the_published_objects(published):
  model = hivit_jax.create_model(weights=published, **UNSEEN)
  settings = model.settings
  assert settings.position_image_size == (64, 64)
  assert (settings.embed_dim, settings.depths, settings.num_heads) == (32, (1, 1, 2), 4)
  assert (settings.num_classes, settings.neck_channels, settings.hidden) == (5, 8, 16)
  images = last(ARRAYS['image_nchw']).astype(np.float32)
  sizes = np.array([CONFIG['img_shape']], np.int32)
  found = jax.jit(lambda model: model.detect(images, sizes))(model)
  np.testing.assert_array_equal(found.labels[0], ARRAYS['det_labels'])
  np.testing.assert_allclose(found.scores[0], ARRAYS['det_bboxes'][:, 4], atol=1e-4)


def test_what_a_file_does_not_say_is_as_published_and_there_is_a_warning(published, caplog):
  described = carried.model_of(files.read(published), num_heads=4)
  assert described.guessed == ('window_size', 'global_blocks')
  assert (described.arguments['window_size'], described.arguments['global_blocks']) == (14, (1,))
  nnx.eval_shape(lambda: hivit_jax.create_model(described.name, **described.arguments))
  (warning,) = caplog.messages
  assert 'does not say window_size (assumed 14), global_blocks (assumed (1,))' in warning


SMALL = {'num_classes': 3, 'neck_channels': 8, 'hidden': 16}


@pytest.mark.parametrize(
  ('name', 'settings'),
  [('hivit_tiny', DETECTOR | {'cascade': True}), ('swin_tiny', TINY_SWIN | SMALL)],
)
def test_names_and_shapes_tell_a_cascade_and_a_swin(name, settings, caplog):
  _, params = abstract_model(f'detect_{name}', **settings)
  state = StateDict(exporter.named_arrays(jax.tree.map(_zeros, params)), 'the file', {})
  assert infer.family(state.arrays) == 'detector'
  heads = {} if name == 'swin_tiny' else {'num_heads': settings['num_heads']}
  described = infer.describe(state.arrays, 'the file', **heads)
  assert described.name.startswith('detect_')
  _, again = abstract_model(described.name, **described.arguments)
  assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, params)
  exported = exporter.in_layout(state._replace(metadata={'image_size': settings['image_size']}))
  assert files.normal_names(exported).keys() >= state.arrays.keys()
  assert ('a mask head per stage' in caplog.text) == bool(settings.get('cascade'))


def _zeros(leaf):
  return np.zeros(leaf.shape, np.float32)


def test_exported_names_are_the_official_ones_and_values_come_back(published, tmp_path):
  model = hivit_jax.create_model(weights=published, **UNSEEN)
  exported = exporter.state_dict(model)
  counters = {name for name in exported if name.endswith('num_batches_tracked')}
  assert exported.keys() - counters == OFFICIAL.keys()
  assert len(counters) == 4
  for name, value in OFFICIAL.items():
    np.testing.assert_array_equal(exported[name], value, err_msg=name)
  path = tmp_path / 'ours.pth'
  files.write(path, exported, wrapped_in='state_dict')
  again = hivit_jax.create_model(weights=path, **UNSEEN)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_a_pretrained_encoder_begins_a_detector():
  mae = nnx.merge(*random_model('mae_hivit_tiny', **TINY_MAE, rpe=False))
  state = StateDict(exporter.named_arrays(nnx.to_pure_dict(nnx.state(mae))), 'the MAE', {})
  model = hivit_jax.create_model('detect_hivit_tiny', **DETECTOR)
  report = importer.load_into(model, state, partial=True)
  assert all(name.startswith(('neck', 'rpn_head', 'roi_head', 'fpn')) for name in report.new)
  assert all(name.startswith(('decoder', 'mask_token', 'norm')) for name in report.dropped)
  np.testing.assert_array_equal(model.backbone.absolute_pos_embed[...], mae.absolute_pos_embed[...])


def test_a_detector_of_other_classes_keeps_all_but_what_depends_on_them(published):
  options = DETECTOR | {'num_classes': 3}
  model = hivit_jax.create_model('detect_hivit_tiny', **options)
  report = importer.load_into(model, files.read(published), partial=True)
  heads = ('bbox_head.fc_cls', 'bbox_head.fc_reg', 'mask_head.conv_logits')
  assert sorted(report.new) == sorted(
    f'roi_head.{head}.{leaf}' for head in heads for leaf in ('bias', 'weight')
  )
