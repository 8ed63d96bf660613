"""Mask R-CNN's parts and its detections against mmdetection's numbers."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.data import masks
from hivit_jax.detection import anchors, boxes
from hivit_jax.detection.assign import Sample
from hivit_jax.errors import UserError
from hivit_jax.interop import torch_names
from hivit_jax.models.detection_heads import FPN, BoxHead, MaskHead, RPNHead
from hivit_jax.models.mask_rcnn import MaskRCNN, suppress_classes
from hivit_jax.tasks import detection_losses as losses
from tests.helpers import (
  GOLDEN,
  abstract_model,
  assert_close,
  golden_params,
  load_golden,
  random_images,
  random_model,
  torch_gradients,
)

DETECTOR = {
  'image_size': 64,
  'position_image_size': 64,
  'embed_dim': 32,
  'depths': (1, 1, 2),
  'num_heads': 4,
  'window_size': 4,
  'global_blocks': (1,),
  'num_classes': 5,
  'neck_channels': 8,
  'hidden': 16,
  'nms_pre': (100, 100),
  'proposals': 40,
  'detections': 12,
}


def last(x):
  """(..., C, h, w) -> (..., h, w, C) float64."""
  return np.moveaxis(np.asarray(x, np.float64), -3, -1)


def first(x):
  return np.moveaxis(np.asarray(x), -1, -3)


class Part:
  """A module with the parameters of a golden file, in float64."""

  def __init__(self, create, arrays, prefix=''):
    graphdef, abstract = nnx.split(nnx.eval_shape(create))
    own = {
      'param/' + k.removeprefix(f'param/{prefix}'): v
      for k, v in arrays.items()
      if k.startswith(f'param/{prefix}')
    }
    self.graphdef = graphdef
    params = golden_params(nnx.to_pure_dict(abstract), own, set())
    self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def model(self, params):
    return nnx.merge(self.graphdef, params)


def assert_gradients(grads, arrays, prefix, relative=1e-5):
  found = torch_gradients(grads)
  expected = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
  assert set(expected) == {k for k in found if 'running' not in k}
  for name, value in expected.items():
    assert_close(found[name], value, name=name, relative=relative)


OPTIONS = {'dtype': 'float64'}


def test_the_pyramid_and_its_gradients_equal_the_official_ones():
  config, arrays = load_golden('detection_fpn.npz')
  part = Part(
    lambda: FPN(config['in_channels'], config['out_channels'], rngs=nnx.Rngs(0), **OPTIONS), arrays
  )
  for case, prefix in (('even', 'grad/'), ('odd', 'odd/grad/')):
    inputs = [last(arrays[f'{case}/input/{i}']) for i in range(4)]
    weights = [last(arrays[f'{case}/weights/{i}']) for i in range(5)]

    @jax.jit
    def run(params, inputs, weights):
      outputs, pull = jax.vjp(lambda p, x: part.model(p)(x), params, inputs)
      return outputs, pull(tuple(weights))

    with jax.enable_x64(True):
      outputs, (grads, of_inputs) = run(part.params, inputs, weights)
    for i, output in enumerate(outputs):
      assert_close(first(output), arrays[f'{case}/output/{i}'])
    for i, gradient in enumerate(of_inputs):
      assert_close(first(gradient), arrays[f'{case}/grad_input/{i}'])
    assert_gradients(grads, arrays, prefix)


@pytest.fixture(scope='module')
def heads():
  return load_golden('detection_heads.npz')


def test_the_proposal_head_its_losses_and_gradients_equal_the_official_ones(heads):
  config, arrays = heads
  part = Part(lambda: RPNHead(8, rngs=nnx.Rngs(0), **OPTIONS), arrays, 'rpn_head.')
  maps = [last(arrays[f'rpn/input/{i}']) for i in range(5)]
  shapes = [x.shape[1:3] for x in maps]
  every = np.concatenate(
    [anchors.level_anchors(s, n) for s, n in zip(shapes, anchors.STRIDES, strict=True)]
  ).astype(np.float64)

  def loss(params, maps):
    model = part.model(params)
    levels = [model(x) for x in maps]
    logits, deltas = (jnp.concatenate(x, axis=1) for x in zip(*levels, strict=True))
    total = jnp.zeros(2)
    for image in range(2):
      of_image = [arrays[f'rpn/{kind}_inds/{image}'] for kind in ('pos', 'neg')]
      index = np.concatenate(of_image)
      positive = np.arange(len(index)) < len(of_image[0])
      gt = jnp.asarray(arrays[f'rpn/gt/{image}'], jnp.float64)
      owner = boxes.iou(jnp.asarray(every[index]), gt).argmax(axis=1)
      sample = Sample(index, np.ones(len(index), bool), positive, owner)
      of_class, of_box = losses.rpn_sums(
        logits[image], deltas[image], jnp.asarray(every), gt, sample
      )
      total += jnp.stack([of_class, of_box]) / (2 * config['rpn_samples'])
    return sum(total), (total, levels)

  with jax.enable_x64(True):
    (value, (parts, levels)), (grads, of_maps) = jax.jit(
      jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(part.params, maps)
  assert_close(value, arrays['rpn/loss'])
  for part, kind in zip(parts, ('cls', 'bbox'), strict=True):  # theirs are those of five levels
    assert_close(part, sum(arrays[f'rpn/loss_{kind}/{i}'] for i in range(5)))
  for i, (logits, deltas) in enumerate(levels):
    shape = (2, *shapes[i], -1)
    assert_close(first(logits.reshape(shape)), arrays[f'rpn/cls/{i}'])
    assert_close(first(deltas.reshape(shape)), arrays[f'rpn/reg/{i}'])
    assert_close(first(of_maps[i]), arrays[f'rpn/grad_input/{i}'])
  assert_gradients(grads, arrays, 'grad/rpn_head.')


def test_proposals_equal_the_official_ones(heads):
  """Of two images, one smaller than the canvas, all of which takes part; 100 of each, and 20."""
  config, arrays = heads
  settings = types.SimpleNamespace(nms_pre=(200, 0), proposals=100, anchor_scale=8.0)
  maps = {}
  for name in ('cls', 'reg'):
    maps[name] = [np.moveaxis(arrays[f'rpn/{name}/{i}'], 1, -1) for i in range(5)]

  @jax.jit
  def run(logits, deltas):
    logits = [x.reshape(2, -1) for x in logits]
    deltas = [x.reshape(2, -1, 4) for x in deltas]
    model = types.SimpleNamespace(settings=settings)
    sizes = np.asarray(config['image_sizes'], np.int32)
    return MaskRCNN.proposals(model, logits, deltas, config['feature_shapes'], sizes, train=True)

  found = run(maps['cls'], maps['reg'])
  assert found.valid.all()
  boxes, scores = np.asarray(found.boxes), np.asarray(nnx.sigmoid(found.scores))
  for kind, count in (('medium', 100), ('small', 20)):
    for i in range(2):
      expected = arrays[f'rpn/proposals_{kind}/{i}']
      assert_close(boxes[i, :count], expected[:, :4])
      assert_close(scores[i, :count], expected[:, 4])


def test_the_box_head_its_losses_gradients_and_statistics_equal_the_official_ones(heads):
  _, arrays = heads
  part = Part(
    lambda: BoxHead(8, 16, 5, size=7, boxes=5, rngs=nnx.Rngs(0), **OPTIONS), arrays, 'bbox_head.'
  )
  features = last(arrays['box/feats'])
  rois = arrays['box/rois'][:, 1:].astype(np.float64)
  labels, targets = arrays['box/labels'], arrays['box/targets'].astype(np.float64)
  count = len(rois)

  # Empty slots at the end, of features that would show in the statistics, change nothing.
  def padded(x, fill=0):
    return np.concatenate([x, np.full((3, *x.shape[1:]), fill, x.dtype)])

  valid = np.arange(count + 3) < count
  slots = padded(rois), padded(labels), padded(targets)

  def loss(params, features):
    model = part.model(params)
    logits, deltas = model(features, valid)
    sums = losses.box_sums(logits, deltas, *slots, valid)
    background = slots[0], np.full_like(slots[1], 5), slots[2]
    without = losses.box_sums(logits, deltas, *background, valid)
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    return (sums['class'] + sums['box']) / count, ((sums, without), logits, deltas, statistics)

  with jax.enable_x64(True):
    (_, (sums, logits, deltas, statistics)), (grads, of_features) = jax.jit(
      jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(part.params, padded(features, 9.0))
    evaluated = jax.jit(lambda params: part.model(params)(features))(part.params)
    sums, without = jax.device_get(sums)
  assert_close(sums['class'] / count, arrays['box/loss_cls'])
  assert_close(sums['box'] / count, arrays['box/loss_bbox'])
  assert_close(100 * sums['right'] / count, arrays['box/acc'][0])
  assert_close(without['class'] / count, arrays['box/no_positive/loss_cls'])
  assert without['box'] == arrays['box/no_positive/loss_bbox'] == 0
  assert_close(logits[:count], arrays['box/cls_score'])
  assert_close(deltas[:count].reshape(count, -1), arrays['box/bbox_pred'])
  assert_close(first(of_features[:count]), arrays['box/grad_feats'])
  assert not np.any(of_features[count:])
  assert_close(evaluated[0], arrays['box/eval_cls_score'])
  assert_close(evaluated[1].reshape(count, -1), arrays['box/eval_bbox_pred'])
  assert_gradients(grads, arrays, 'grad/bbox_head.')
  for name, value in torch_gradients(statistics).items():
    assert_close(value, arrays[f'box/after/{name}'], name=name)


def test_the_mask_head_its_loss_and_gradients_equal_the_official_ones(heads):
  _, arrays = heads
  part = Part(lambda: MaskHead(8, 5, rngs=nnx.Rngs(0), **OPTIONS), arrays, 'mask_head.')
  features, labels = last(arrays['mask/feats']), arrays['mask/labels']

  def loss(params, features):
    logits = part.model(params)(features, labels)
    total = losses.mask_sum(logits, arrays['mask/targets'], np.ones(len(labels), bool))
    return total / len(labels), logits

  with jax.enable_x64(True):
    (value, logits), (grads, of_features) = jax.jit(
      jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(part.params, features)
  assert_close(value, arrays['mask/loss'][0])
  assert_close(logits, arrays['mask/pred'][np.arange(len(labels)), labels])
  assert_close(first(of_features), arrays['mask/grad_feats'])
  assert_gradients(grads, arrays, 'grad/mask_head.')


def test_parameters_have_the_names_and_shapes_of_mmdetection():
  _, abstract = abstract_model('detect_hivit_base')
  found = {}
  for path, leaf in torch_names.flatten(abstract).items():
    name, value = torch_names.to_torch(path, np.broadcast_to(0, leaf.shape))
    found[name] = list(value.shape)
  expected = json.loads((GOLDEN / 'state_dict_names_detection.json').read_text())
  expected = {k: v for k, v in expected.items() if not k.endswith('num_batches_tracked')}
  assert found == expected
  statistics = sum(math.prod(s) for name, s in found.items() if 'running' in name)
  assert sum(map(math.prod, found.values())) - statistics == 87_368_560


def test_a_cascade_has_three_box_heads_with_one_box_for_all_classes():
  sizes = []
  for cascade in (False, True):
    _, abstract = abstract_model('detect_hivit_base', cascade=cascade)
    head = abstract['roi_head']['bbox_head']
    sizes.append(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(head)))
  # 80 boxes, or 1, from 1024 features and a bias; 2048 running statistics are counted, too.
  assert sizes[0] == 15_618_449 + 2048
  assert sizes[1] == 3 * (sizes[0] - 4 * 79 * 1025)


def test_suppression_of_all_classes_equals_the_official_one():
  _, arrays = load_golden('detection_boxes.npz')
  r = len(arrays['multiclass/scores'])
  own = arrays['multiclass/boxes'].reshape(r, -1, 4)
  for most in (100, 12):
    found, scores, labels, valid = map(
      np.asarray,
      suppress_classes(
        jnp.asarray(own),
        jnp.asarray(arrays['multiclass/scores'][:, :-1]),
        threshold=0.05,
        candidates=4096,
        most=most,
      ),
    )
    expected = arrays[f'multiclass/dets_{most}']
    assert valid.sum() == len(expected)
    np.testing.assert_array_equal(labels[valid], arrays[f'multiclass/labels_{most}'])
    np.testing.assert_allclose(found[valid], expected[:, :4], atol=1e-4)
    np.testing.assert_allclose(scores[valid], expected[:, 4], atol=1e-6)


def test_detections_of_an_image_equal_the_official_ones_stage_by_stage():
  config, arrays = load_golden('detection_postprocess.npz')
  graphdef, abstract = abstract_model('detect_hivit_tiny', **DETECTOR, dtype='float64')
  params = golden_params(abstract, arrays, set())
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  images, sizes = last(arrays['image_nchw']), np.array([config['img_shape']], np.int32)

  @jax.jit
  def run(params):
    model: MaskRCNN = nnx.merge(graphdef, params)
    encoded = model.maps(images, None, None)
    maps = model.pyramid(images)
    logits, deltas = model.rpn(maps)
    shapes = [x.shape[1:3] for x in maps]
    proposals = model.proposals(logits, deltas, shapes, sizes, train=False)
    features = model.roi_features(maps, proposals.boxes, 7)
    ((head, _),) = model.box_heads
    of_rois = features, *head(features)
    return encoded, maps, logits, deltas, proposals, of_rois, model.detect(images, sizes)

  with jax.enable_x64(True):
    encoded, maps, logits, deltas, proposals, of_rois, found = run(params)
  for i, x in enumerate(encoded):
    assert_close(first(x), arrays[f'backbone/{i}'])
  for i, x in enumerate(maps):
    assert_close(first(x), arrays[f'fpn/{i}'])
    assert_close(first(logits[i].reshape(*x.shape[:3], 3)), arrays[f'rpn_cls/{i}'])
    assert_close(first(deltas[i].reshape(*x.shape[:3], 12)), arrays[f'rpn_reg/{i}'])
  assert proposals.valid.all()
  assert_close(proposals.boxes[0], arrays['proposals'][:, :4])
  assert_close(nnx.sigmoid(proposals.scores[0]), arrays['proposals'][:, 4])
  features, class_logits, box_deltas = of_rois
  assert_close(first(features[:6]), arrays['bbox_feats'])
  assert_close(class_logits, arrays['cls_score'])
  assert_close(box_deltas.reshape(len(class_logits), -1), arrays['bbox_pred'])
  assert found.valid.all()
  np.testing.assert_array_equal(found.labels[0], arrays['det_labels'])
  own = arrays['mask_logits'][np.arange(12), arrays['det_labels']]
  assert_close(found.masks[0], nnx.sigmoid(own))
  scale = np.asarray(config['scale_factor'])
  original = np.asarray(found.boxes[0]) / scale
  assert_close(original, arrays['det_bboxes'][:, :4])
  assert_close(found.scores[0], arrays['det_bboxes'][:, 4])
  size = config['ori_shape']
  expected = np.unpackbits(arrays['masks'], axis=1)[:, : size[0] * size[1]].reshape(-1, *size)
  for probabilities, box, mask in zip(found.masks[0], original, expected, strict=True):
    pasted = masks.paste(np.asarray(probabilities), box, tuple(size))
    unclear = np.abs(pasted - 0.5) < 1e-5
    assert ((pasted >= 0.5) == mask)[~unclear].all()
    assert unclear.sum() < 5


def test_swin_makes_maps_of_all_strides():
  graphdef, params = abstract_model('detect_swin_tiny', image_size=(64, 128), window_size=2)
  images = jax.ShapeDtypeStruct((2, 64, 128, 3), 'float32')
  maps = jax.eval_shape(lambda params, x: nnx.merge(graphdef, params).pyramid(x), params, images)
  assert [x.shape[1:] for x in maps] == [(-(-64 // s), 128 // s, 256) for s in anchors.STRIDES]


def test_vit_makes_maps_of_all_strides_from_its_own_part_of_a_canvas():
  options = {key: DETECTOR[key] for key in DETECTOR if key != 'depths'} | {'depth': 2}
  graphdef, params = random_model('detect_vit_base', **options, dtype='float64')
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  images = random_images(2, 96, 128, 3).astype(np.float64)
  images[1, 64:] = images[1, :, 96:] = 0
  canvases = np.array([[96, 128], [64, 96]], np.int32)

  @jax.jit
  def run(params, images, canvases):
    return nnx.merge(graphdef, params).pyramid(images, canvases)

  with jax.enable_x64(True):
    maps = run(params, images, canvases)
    alone = run(params, images[1:, :64, :96], None)
  for stride, x, expected in zip(anchors.STRIDES, maps, alone, strict=True):
    assert x.shape == (2, -(-96 // stride), 128 // stride, 8)
    rows, columns = expected.shape[1:3]
    assert_close(x[1, :rows, :columns], expected[0], name=f'stride {stride}')


def test_mistakes_in_settings_are_named():
  with pytest.raises(UserError, match='num_classes must be at least 1, got 0'):
    hivit_jax.create_model('detect_hivit_tiny', **DETECTOR | {'num_classes': 0})
  with pytest.raises(UserError, match='anchor_scale must be more than 0, got -1'):
    hivit_jax.create_model('detect_hivit_tiny', **DETECTOR | {'anchor_scale': -1})
  with pytest.raises(UserError, match='detections and candidates must be at least 1'):
    hivit_jax.create_model('detect_hivit_tiny', **DETECTOR | {'detections': 0})
