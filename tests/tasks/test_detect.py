"""Training Mask R-CNN: against mmdetection's numbers, and what they do not show."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.data import masks
from hivit_jax.detection import boxes as box_ops
from hivit_jax.detection import mask_targets
from hivit_jax.detection.assign import Sample
from hivit_jax.interop import torch_names
from hivit_jax.models import mask_rcnn
from hivit_jax.models.mask_rcnn import MASK_CELLS, STAGES, MaskRCNN
from hivit_jax.tasks import detect
from hivit_jax.tasks import detection_targets as targets
from hivit_jax.train import optim, rules
from tests.helpers import (
  GOLDEN,
  abstract_model,
  assert_close,
  assert_trees_close,
  golden_params,
  load_golden,
  random_model,
  torch_gradients,
)
from tests.models.test_mask_rcnn import DETECTOR

SLOTS = 100
KEY = jax.random.key(0)
LOSSES = ('rpn_class', 'rpn_box', 'class', 'box', 'mask')
# Pixels of the golden images are normalised already; the task gets these as they are.
TASK = detect.DetectTask(mean=(0, 0, 0), std=(1, 1, 1), num_classes=5, anchors=24, rois=16)


def unpack(packed, *shape):
  return np.unpackbits(packed, axis=-1)[..., : np.prod(shape)].reshape(*packed.shape[:-1], *shape)


def padded(x, fill=0):
  return np.pad(x, ((0, SLOTS - len(x)), *((0, 0),) * (x.ndim - 1)), constant_values=fill)


def objects_of(gt, image, dtype=np.float64):
  boxes, bitmaps = gt[f'gt_boxes/{image}'], unpack(gt[f'gt_masks/{image}'], 96, 128)
  crops = np.stack([masks.crop(m, b) for m, b in zip(bitmaps, boxes, strict=True)])
  return {
    'boxes': padded(boxes.astype(dtype)),
    'labels': padded(gt[f'gt_labels/{image}']),
    'exists': np.arange(SLOTS) < len(boxes),
    'masks': padded(crops),
  }


def stack(examples):
  return jax.tree.map(lambda *x: np.stack(x), *examples)


def high_at(index, count):
  """Priorities that choose the given ones, in their order."""
  priorities = np.zeros(count)
  priorities[index] = np.linspace(0.9, 0.5, len(index))
  return priorities


@pytest.fixture(scope='module')
def golden():
  """The published pass on two images, with the samples that it drew."""
  config, arrays = load_golden('detection_train.npz')
  batch = stack([objects_of(arrays, i) for i in range(2)])
  batch['image'] = np.moveaxis(arrays['image_nchw'].astype(np.float64), 1, 3)
  batch['size'] = np.asarray(config['img_shapes'], np.int32)
  shapes = detect.map_shapes(96, 128)
  with jax.enable_x64(True):
    anchors = detect.all_anchors(shapes)
    own = detect.own_shapes(np.asarray(config['pad_shapes']))
    samples, rois = [], []
    for i in range(2):
      index = np.concatenate([arrays[f'rpn/{kind}_inds/{i}'] for kind in ('pos', 'neg')])
      samples.append(
        targets.rpn_sample(
          anchors,
          detect.valid_anchors(shapes, own[i]),
          jnp.asarray(batch['boxes'][i]),
          batch['exists'][i],
          high_at(index, len(anchors)),
          24,
        )
      )
      # Their proposals follow the objects, ours follow the slots.
      index = np.concatenate([arrays[f'rcnn/{kind}_inds/{i}'] for kind in ('pos', 'neg')])
      objects = batch['exists'][i].sum()
      index = np.where(index < objects, index, index + SLOTS - objects)
      rois.append(high_at(index, SLOTS + 40))
  sample = stack([jax.device_get(s) for s in samples])
  batch |= {f'anchor_{key}': value for key, value in sample._asdict().items()}
  batch |= {'anchor_count': np.float64(sample.valid.sum()), 'images': np.float64(2)}
  batch['roi_priorities'] = np.stack(rois)
  return arrays, batch, sample


def test_the_sampled_anchors_are_the_official_ones(golden):
  arrays, _, sample = golden
  for i in range(2):
    positive, negative = (arrays[f'rpn/{kind}_inds/{i}'] for kind in ('pos', 'neg'))
    np.testing.assert_array_equal(sample.index[i], [*positive, *negative])
    assert sample.positive[i].sum() == len(positive)
    assert sample.valid[i].all()


class OfImages(detect.DetectTask):
  """Gets the normalised images of the golden file."""

  def padded_images(self, batch):
    return batch['image']


def test_losses_gradients_and_statistics_equal_the_official_ones(golden, monkeypatch):
  """And so do proposals, RoIs and what the heads make of these.

  Given the official mask targets, from which those made of crops differ in few pixels.
  """
  arrays, batch, _ = golden
  official = unpack(arrays['rcnn/mask_targets'], 28, 28).reshape(2, 4, 28, 28)
  graphdef, abstract = abstract_model('detect_hivit_tiny', **DETECTOR, dtype='float64')
  params = golden_params(abstract, arrays, set())
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  task = OfImages(mean=(0, 0, 0), std=(1, 1, 1), num_classes=5, anchors=24, rois=16)
  sent = {}
  mask_sum = detect.losses.mask_sum

  def with_official_targets(logits, wanted, positive):
    sent.update(wanted=wanted, masks=logits)
    return mask_sum(logits, official.reshape(-1, MASK_CELLS, MASK_CELLS), positive)

  box_sums, propose = detect.losses.box_sums, MaskRCNN.proposals

  def remembered_sums(logits, deltas, rois, labels, *rest):
    sent.update(logits=logits, deltas=deltas, rois=rois, labels=labels)
    return box_sums(logits, deltas, rois, labels, *rest)

  def remembered_proposals(*args, **kwargs):
    sent['proposals'] = propose(*args, **kwargs)
    return sent['proposals']

  monkeypatch.setattr(detect.losses, 'mask_sum', with_official_targets)
  monkeypatch.setattr(detect.losses, 'box_sums', remembered_sums)
  monkeypatch.setattr(MaskRCNN, 'proposals', remembered_proposals)

  def loss(params):
    model = nnx.merge(graphdef, params)
    value, metrics = task.losses(model, batch, None)
    return value, (metrics, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), sent)

  with jax.enable_x64(True):
    (value, (metrics, statistics, stages)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      params
    )
  stages = jax.device_get(stages)
  for i in range(2):
    proposals = arrays[f'proposals/{i}']
    assert_close(stages['proposals'].boxes[i], proposals[:, :4])
    assert_close(nnx.sigmoid(stages['proposals'].scores[i]), proposals[:, 4])
    assert_close(stages['rois'].reshape(2, -1, 4)[i], arrays[f'rcnn/boxes/{i}'])
    np.testing.assert_array_equal(
      stages['labels'].reshape(2, -1)[i, :4], arrays[f'rcnn/pos_labels/{i}']
    )
  assert_close(stages['logits'], arrays['rcnn/cls_score'])
  # The golden file is float32. Our own float32 is 1.1e-5 away from our float64.
  assert_close(stages['deltas'].reshape(32, -1), arrays['rcnn/bbox_pred'], relative=2e-5)
  own = np.concatenate([arrays[f'rcnn/pos_labels/{i}'] for i in range(2)])
  assert_close(stages['masks'], arrays['rcnn/mask_pred'][np.arange(8), own])
  assert_close(metrics['loss_rpn_class'], arrays['loss/loss_rpn_cls'].sum())
  assert_close(metrics['loss_rpn_box'], arrays['loss/loss_rpn_bbox'].sum())
  assert_close(metrics['loss_class'], arrays['loss/loss_cls'])
  assert_close(metrics['loss_box'], arrays['loss/loss_bbox'])
  assert_close(100 * float(metrics['roi_accuracy']), arrays['loss/acc'])
  assert_close(metrics['loss_mask'], arrays['loss/loss_mask'])
  assert_close(value, arrays['loss/total'])
  found_grads = torch_gradients(grads)
  for name, expected in arrays.items():
    if name.startswith('grad/'):
      assert_close(found_grads[name[5:]], expected, name=name, relative=2e-5)
  for name, statistic in torch_gradients(statistics).items():
    assert_close(statistic, arrays[f'after/{name}'], name=name)
  clear = ~unpack(arrays['rcnn/mask_targets_at_half'], 28, 28).astype(bool)
  differ = (stages['wanted'].reshape(-1, 28, 28) != official.reshape(-1, 28, 28)) & clear
  assert differ.mean() < 0.01, differ.mean()


def test_in_bfloat16_boxes_scores_overlaps_and_losses_are_float32(monkeypatch):
  """Coordinates above 256 would be two pixels off."""
  graphdef, params = abstract_model('detect_hivit_tiny', **DETECTOR, dtype='bfloat16')
  seen = {}

  def remember(module, name):
    function = getattr(module, name)

    def remembered(*args, **kwargs):
      seen.setdefault(name, []).append((args, kwargs))
      return function(*args, **kwargs)

    monkeypatch.setattr(module, name, remembered)

  for name in ('rpn_sums', 'box_sums', 'mask_sum'):
    remember(detect.losses, name)
  for name in ('intersection_and_union', 'encode', 'decode', 'clip'):
    remember(box_ops, name)
  remember(mask_rcnn, 'roi_align')

  def run(params, batch):
    model = nnx.merge(graphdef, params)
    return TASK.loss(model, TASK.prepare(model, batch, KEY)), TASK.detections(model, batch)

  def types(tree):
    found = {x.dtype for x in jax.tree.leaves(tree) if hasattr(x, 'dtype')}
    return {t.name for t in found if jnp.issubdtype(t, jnp.floating)}

  batch = batch_of((64, 64), sizes=((64, 64), (64, 61)), slots=4)
  results = jax.eval_shape(run, params, batch | {'original': batch['size']})
  for (maps, rois, *_), _ in seen.pop('roi_align'):
    assert types(maps) == {'bfloat16'}
    assert types(rois) == {'float32'}
  assert len(seen) == 7
  for calls in (results, *seen.values()):
    assert types(calls) == {'float32'}


def test_layer_and_weight_decay_are_the_official_ones():
  expected = json.loads((GOLDEN / 'detection_layer_decay.json').read_text())
  _, abstract = abstract_model('detect_hivit_base')
  task = detect.DetectTask
  scales = optim.layer_scales(abstract, 0.9, task.encoder, task.stem_is_one_layer)
  labels = torch_names.flatten(rules.apply_rules(task.rules, abstract))
  found = {}
  for path, scale in torch_names.flatten(scales).items():
    if path[-1] not in ('mean', 'var'):  # running statistics, which no optimizer sees
      leaf = np.zeros((1, 1, 1, 1)) if path[-1] == 'kernel' else np.zeros(1)
      name = torch_names.to_torch(path, leaf)[0]
      found[name] = [scale, 0.05 if labels[path] == 'decay' else 0.0]
  assert found.keys() == expected.keys()
  for name, pair in expected.items():
    assert found[name] == pytest.approx(pair), name


def test_crops_are_as_large_as_the_data_make_them():
  assert mask_targets.CROP == masks.CROP


def batch_of(canvas, *, sizes=((90, 120), (64, 61)), objects=2, slots=SLOTS, seed=0):
  """Two images of noise and boxes on a canvas."""
  examples = []
  for image, (height, width) in enumerate(sizes):
    rng = np.random.default_rng((seed, image))
    picture = np.zeros((*canvas, 3), np.uint8)
    picture[:height, :width] = rng.integers(0, 256, (height, width, 3))
    corner = rng.random((slots, 2)) * np.array([width, height]) * 0.4
    side = rng.random((slots, 2)) * np.array([width, height]) * 0.3 + 8
    examples.append(
      {
        'image': picture,
        'size': np.array([height, width], np.int32),
        'boxes': np.concatenate([corner, corner + side], 1).astype(np.float32),
        'labels': rng.integers(0, 5, slots).astype(np.int32),
        'exists': np.arange(slots) < objects,
        'masks': rng.integers(0, 256, (slots, 112, 112)).astype(np.uint8),
      }
    )
  return stack(examples)


@pytest.fixture(scope='module')
def detector():
  """In float64, so that no rounding decides which of two boxes is the better one."""
  graphdef, params = random_model('detect_hivit_tiny', **DETECTOR, dtype='float64')
  return graphdef, jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def test_more_canvas_changes_no_feature_and_no_detection(detector):
  graphdef, params = detector
  task = TASK

  def run(params, batch):
    model = nnx.merge(graphdef, params)
    images = task.padded_images(batch)
    canvases = detect.own_canvas(batch['size'])
    maps = model.pyramid(images, canvases)
    return maps, model.detect(images, batch['size'], canvases)

  small = batch_of((96, 128))
  large = batch_of((160, 192))
  with jax.enable_x64(True):
    (maps, found), (larger, found_larger) = (jax.jit(run)(params, b) for b in (small, large))
  own = detect.own_shapes(detect.own_canvas(small['size']))
  for level, (a, b) in enumerate(zip(maps, larger, strict=True)):
    for image in range(2):
      rows, columns = own[image, level]
      part = a[image, :rows, :columns]
      assert_close(b[image, :rows, :columns], part, name=f'level {level}')
  assert np.any(found.valid)
  np.testing.assert_array_equal(found.valid, found_larger.valid)
  np.testing.assert_array_equal(found.labels, found_larger.labels)
  for a, b in ((found.boxes, found_larger.boxes), (found.masks, found_larger.masks)):
    assert_close(b, a)


def test_an_image_on_its_own_canvas_needs_no_masks(detector):
  graphdef, params = detector
  batch = batch_of((64, 96), sizes=((60, 90), (64, 96)))

  @jax.jit
  def run(params):
    model = nnx.merge(graphdef, params)
    images = TASK.padded_images(batch)
    return model.pyramid(images), model.pyramid(images, detect.own_canvas(batch['size']))

  with jax.enable_x64(True):
    plain, masked = run(params)
  for a, b in zip(plain, masked, strict=True):
    assert_close(b, a)


@pytest.fixture(scope='module')
def gradients(detector):
  """`gradients(prepared, terms)`: metrics and gradients of the sum of some losses, in float64."""
  graphdef, params = detector

  def loss(params, prepared, chosen):
    total, metrics = TASK.loss(nnx.merge(graphdef, params), prepared)
    terms = [metrics[f'loss_{name}'] for name in LOSSES]
    return jnp.stack(terms) @ chosen, (total, metrics)

  run = jax.jit(jax.grad(loss, has_aux=True))

  def of(prepared, terms=LOSSES):
    chosen = np.array([name in terms for name in LOSSES], np.float64)
    with jax.enable_x64(True):
      grads, (total, metrics) = jax.device_get(run(params, prepared, chosen))
    return total, metrics, grads

  return of


@pytest.fixture(scope='module')
def prepare(detector):
  """`prepare(batch)`: with the random numbers of a step."""
  graphdef, params = detector
  run = jax.jit(lambda params, batch: TASK.prepare(nnx.merge(graphdef, params), batch, KEY))
  return lambda batch: jax.device_get(run(params, batch))


def test_more_canvas_changes_no_loss_and_no_gradient(gradients, prepare):
  (total, metrics, grads), (total2, metrics2, grads2) = (
    gradients(prepare(batch_of(canvas))) for canvas in ((96, 128), (128, 192))
  )
  assert_close(total2, total)
  assert_trees_close(metrics2, metrics)
  assert_trees_close(grads2, grads)


@pytest.mark.parametrize('objects', [0, SLOTS])
def test_no_object_and_a_hundred_give_finite_losses_and_gradients(gradients, prepare, objects):
  total, metrics, grads = gradients(prepare(batch_of((96, 128), objects=objects)))
  assert_close(total, sum(metrics[f'loss_{name}'] for name in LOSSES), relative=1e-6)
  assert np.isfinite(total)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
  assert (metrics['loss_box'] > 0) == (metrics['loss_mask'] > 0) == (objects > 0)


def test_no_gradient_goes_through_proposals(gradients, prepare):
  """What is lost on RoIs reaches the encoder, but not the head that proposed them."""
  _, _, grads = gradients(prepare(batch_of((96, 128))), ('class', 'box', 'mask'))
  assert not any(np.any(x) for x in jax.tree.leaves(grads['rpn_head']))
  assert np.any(grads['roi_head']['mask_head']['upsample']['kernel'])
  assert np.any(grads['backbone']['patch_embed']['proj']['kernel'])
  _, _, grads = gradients(prepare(batch_of((96, 128))), ('rpn_class', 'rpn_box'))
  assert np.any(grads['rpn_head']['rpn_reg']['kernel'])
  assert not any(np.any(x) for x in jax.tree.leaves(grads['roi_head']))


def test_one_pixel_objects_do_no_harm(gradients, prepare):
  batch = batch_of((96, 128))
  batch['boxes'][:, 0, 2:] = batch['boxes'][:, 0, :2] + 1
  total, _, grads = gradients(prepare(batch))
  assert np.isfinite(total)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_the_order_of_objects_changes_nothing(gradients, prepare):
  """Each has its random number, as it has its label; whose number is larger is sampled.

  Empty slots may stand between them.
  """
  batch = batch_of((96, 128), objects=4)
  order = np.random.default_rng(0).permutation(SLOTS)
  permuted = batch | {key: batch[key][:, order] for key in ('boxes', 'labels', 'exists', 'masks')}
  prepared, other = prepare(batch), prepare(permuted)
  other['roi_priorities'] = prepared['roi_priorities'].copy()
  other['roi_priorities'][:, :SLOTS] = prepared['roi_priorities'][:, order]
  (total, metrics, grads), (total2, metrics2, grads2) = map(gradients, (prepared, other))
  assert_close(total2, total)
  assert_trees_close(metrics2, metrics)
  assert_trees_close(grads2, grads)


def test_a_hundred_objects_share_the_positive_slots():
  rng = np.random.default_rng(0)
  corner = rng.uniform(0, 500, (100, 2))
  objects = np.concatenate([corner, corner + rng.uniform(10, 200, (100, 2))], 1)
  far = objects + 1000
  found = targets.roi_sample(
    jnp.asarray(np.concatenate([objects + 1, far])),
    jnp.ones(200, bool),
    jnp.asarray(objects),
    jnp.ones(100, bool),
    jnp.asarray(rng.random(300)),
    total=128,
  )
  assert found.sample.positive.tolist() == 32 * [True] + 96 * [False]
  assert found.sample.valid.all()
  shifts = np.asarray(found.boxes[:32]) - objects[np.asarray(found.sample.object[:32])]
  np.testing.assert_allclose(shifts, np.round(shifts), atol=1e-3)
  assert set(np.round(shifts).ravel()) <= {0, 1}
  assert len(set(found.sample.object[:32].tolist())) > 16
  assert (found.boxes[32:] >= 1000).all()


def test_a_cascade_matches_the_boxes_of_a_head_anew_for_the_next():
  objects = jnp.array([[0.0, 0, 100, 100], [0, 0, 0, 0]])
  exists = jnp.array([True, False])
  rois = jnp.array([[0.0, 0, 100, 55], [0, 0, 100, 65], [0, 0, 100, 75], [9, 9, 9, 20]])
  for stage, positive in zip(STAGES, (3, 2, 1), strict=True):
    found = targets.matched(rois, jnp.ones(4, bool), objects, exists, overlap=stage.overlap)
    assert found.sample.positive.sum() == positive
    assert found.sample.valid.tolist() == [True, True, True, False]
    assert found.sample.object.tolist() == [0, 0, 0, 0]
    np.testing.assert_array_equal(found.boxes[:3], rois[:3])


def test_a_cascade_finds_with_the_mean_of_the_scores_of_its_heads():
  graphdef, params = random_model('detect_hivit_tiny', **DETECTOR, cascade=True)
  for i in range(3):  # heads that move no box, and are equally sure of a class of their own
    head = params['roi_head']['bbox_head'][i]
    for layer in ('fc_reg', 'fc_cls'):
      head[layer] = jax.tree.map(jnp.zeros_like, head[layer])
    head['fc_cls']['bias'] = jnp.zeros(6).at[i].set(9.0)
  batch = batch_of((64, 64), sizes=((64, 64), (64, 61)))

  @jax.jit
  def run(params, batch):
    model = nnx.merge(graphdef, params)
    found = model.detect(TASK.padded_images(batch), batch['size'], detect.own_canvas(batch['size']))
    return found, TASK.loss(model, TASK.prepare(model, batch, KEY))[1]

  found, metrics = run(params, batch)
  valid = np.asarray(found.valid)
  np.testing.assert_allclose(found.scores[valid], 1 / 3, rtol=1e-2)
  assert set(np.unique(found.labels[valid])) == {0, 1, 2}
  # Each is wrong, by 9 in its logits, about all RoIs of the background and nearly all others.
  assert metrics['loss_class'] == pytest.approx(9 * (1 + 0.5 + 0.25), rel=0.2)


def test_it_learns_two_scenes_by_heart():
  """The loss falls tenfold: every part of it can be learnt, and what it learns from is there."""
  size = 64
  batch = batch_of((size, size), sizes=((size, size), (size, size)), objects=2, slots=4)
  batch['masks'][:] = 255
  for image, boxes, labels in zip(batch['image'], batch['boxes'], batch['labels'], strict=True):
    boxes[:] = np.round(boxes)
    for (x1, y1, x2, y2), label in zip(boxes[:2].astype(int), labels, strict=False):
      image[y1:y2, x1:x2] = 50 * label
  task = detect.DetectTask(mean=(0.5,) * 3, std=(0.3,) * 3, num_classes=5, anchors=24, rois=16)
  settings = DETECTOR | {'neck_channels': 16, 'hidden': 32, 'anchor_scale': 4.0}
  graphdef, state = nnx.split(hivit_jax.create_model('detect_hivit_tiny', **settings))
  steps, params = 300, nnx.to_pure_dict(state)
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

  @jax.jit
  def train(params, batch):
    prepared = task.prepare(nnx.merge(graphdef, params), batch, KEY)

    def step(carry, _):
      params, moments = carry
      loss = lambda params: task.loss(nnx.merge(graphdef, params), prepared)[0]  # noqa: E731
      total, grads = jax.value_and_grad(loss)(params)
      updates, moments = optimizer.update(grads, moments)
      return (optax.apply_updates(params, updates), moments), total

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]

  # Some optimisation pays in so many steps, all of it does not.
  some = {'xla_backend_optimization_level': 1, 'xla_llvm_disable_expensive_passes': True}
  losses = train.lower(params, batch).compile(some)(params, batch)
  assert losses[0] > 1
  assert losses[-1] < losses[0] / 10


def test_the_objects_themselves_are_sampled_before_any_proposal_is_good():
  boxes = jnp.array([[10.0, 10, 30, 30], [0, 0, 0, 0]])
  far = jnp.array([[50.0, 50, 60, 60], [70, 70, 90, 90]])
  found = targets.roi_sample(
    far, jnp.array([True, False]), boxes, jnp.array([True, False]), jnp.ones(4), total=4
  )
  assert found.sample.positive.tolist() == [True, False, False, False]
  assert found.boxes[:2].tolist() == [[10, 10, 30, 30], [50, 50, 60, 60]]
  assert found.sample.valid.tolist() == [True, True, False, False]
  assert isinstance(found.sample, Sample)
