"""Boxes, anchors, assignment and suppression against mmdetection's numbers and plain loops.

Two numbers of the golden files are of options that the published detector does not use, and that
are not here: `overlaps/iof` and `rpn/ignore_on`, crowds that anchors ignore.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.detection import anchors, assign, boxes, nms
from hivit_jax.tasks import detection_losses, detection_targets
from tests.helpers import assert_close, load_golden

RPN = assign.Rule(0.7, 0.3, 0.3)
RCNN = assign.Rule(0.5, 0.5, 0.5)


@pytest.fixture(scope='module')
def of_boxes():
  with jax.enable_x64(True):
    yield load_golden('detection_boxes.npz')


def f64(x):
  return jnp.asarray(np.asarray(x, np.float64))


def test_anchors_and_their_valid_flags_equal_the_official_ones():
  config, arrays = load_golden('detection_anchors.npz')
  for i, (shape, stride) in enumerate(zip(config['feature_shapes'], anchors.STRIDES, strict=True)):
    np.testing.assert_allclose(
      anchors.base_anchors(stride), arrays[f'base_anchors/{i}'], rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
      anchors.level_anchors(tuple(shape), stride), arrays[f'anchors/{i}'], rtol=0, atol=1e-5
    )
    for j, image in enumerate(config['images']):
      own = anchors.own_shapes(jnp.asarray(image['pad_shape']))[i]
      valid = np.asarray(anchors.level_valid(tuple(shape), own))
      assert (valid == arrays[f'valid/{j}/{i}']).all()


def test_anchors_of_large_images_have_the_official_count_and_sums():
  config, _ = load_golden('detection_anchors.npz')
  check = config['checks']['800x1344']
  for shape, stride, count, sums in zip(
    check['feature_shapes'], anchors.STRIDES, check['counts'], check['sums'], strict=True
  ):
    found = np.asarray(anchors.level_anchors(tuple(shape), stride), np.float64)
    assert len(found) == count
    assert_close(found.sum(axis=0), sums, relative=1e-6)


@pytest.mark.parametrize(('name', 'stds'), [('rpn', (1, 1, 1, 1)), ('rcnn', (0.1, 0.1, 0.2, 0.2))])
def test_coding_of_boxes_equals_the_official_one(of_boxes, name, stds):
  config, arrays = of_boxes
  own = {k.split('/')[-1]: f64(v) for k, v in arrays.items() if k.startswith(f'coder/{name}/')}
  start, target = f64(arrays['coder/boxes']), f64(arrays['coder/gt'])
  encoded = boxes.encode(start, target, stds)
  assert_close(encoded, own['encoded'])
  assert_close(boxes.decode(start, encoded, stds), own['decoded_encoded'])

  def free(deltas):
    return boxes.decode(start, deltas, stds)

  def clipped(deltas):
    return boxes.clip(free(deltas), config['clipped_to'])

  for key, function in (('free', free), ('clipped', clipped)):
    found, pull = jax.vjp(function, own['deltas'])
    assert_close(found, own[key])
    assert_close(pull(own['weights'])[0], own[f'{key}_grad_deltas'], relative=1e-4)


def test_decoding_for_each_class_is_decoding_of_each(of_boxes):
  config, arrays = of_boxes
  deltas = f64(arrays['coder/per_class/deltas']).reshape(24, 5, 4)
  found = boxes.decode(f64(arrays['coder/boxes'])[:, None], deltas, (0.1, 0.1, 0.2, 0.2))
  found = boxes.clip(found, config['clipped_to'])
  assert_close(found.reshape(24, 20), arrays['coder/per_class/decoded'])


def test_overlaps_equal_the_official_ones(of_boxes):
  _, arrays = of_boxes
  a, b = f64(arrays['overlaps/a']), f64(arrays['overlaps/b'])
  assert_close(boxes.iou(a, b), arrays['overlaps/iou'])
  assert_close(boxes.giou(a[:, None], b[None]), arrays['overlaps/giou'])


def test_giou_loss_and_gradient_equal_the_official_ones(of_boxes):
  config, arrays = of_boxes
  pred, target, weight = (f64(arrays[f'giou/{k}']) for k in ('pred', 'target', 'weight'))
  assert_close(boxes.giou(pred, target), arrays['giou/aligned'])
  scale = config['giou']['loss_weight'] / config['giou']['avg_factor']

  def loss(pred):
    return scale * ((1 - boxes.giou(pred, target)) * weight.mean(axis=1)).sum()

  found, grad = jax.value_and_grad(loss)(pred)
  assert_close(found, arrays['giou/loss'])
  assert_close(grad, arrays['giou/grad'])


def test_the_loss_of_decoded_boxes_and_its_gradient_equal_the_official_ones(of_boxes):
  config, arrays = of_boxes
  rois, deltas, target = (f64(arrays[f'giou_decoded/{k}']) for k in ('rois', 'deltas', 'target'))
  labels, valid = jnp.zeros(len(rois), int), jnp.ones(len(rois), bool)

  def loss(deltas):
    sums = detection_losses.box_sums(
      jnp.zeros((len(rois), 2)), deltas[:, None], rois, labels, target, valid
    )
    return sums['box'] / config['giou']['avg_factor']

  found, grad = jax.jit(jax.value_and_grad(loss))(deltas)
  assert_close(found, arrays['giou_decoded/loss'])
  assert_close(grad, arrays['giou_decoded/grad_deltas'])


def kept(found, order):
  """Indices of the kept boxes, best first."""
  return order[np.asarray(found)]


@pytest.mark.parametrize('threshold', [0.5, 0.7])
def test_suppression_equals_the_official_one(threshold):
  _, arrays = load_golden('detection_boxes.npz')
  order = np.argsort(-arrays['nms/scores'], kind='stable')
  ranked = jnp.asarray(arrays['nms/boxes'][order])
  plain = nms.nms(ranked, threshold)
  np.testing.assert_array_equal(kept(plain, order), arrays[f'nms/keep_{threshold}'])
  grouped = nms.nms(ranked, threshold, groups=jnp.asarray(arrays['nms/ids'][order]))
  np.testing.assert_array_equal(kept(grouped, order), arrays[f'nms/batched_keep_{threshold}'])


def test_equal_scores_are_decided_by_position_and_equal_boxes_by_the_strict_threshold():
  _, arrays = load_golden('detection_boxes.npz')
  order = np.argsort(-arrays['nms_ties/scores'], kind='stable')
  found = nms.nms(jnp.asarray(arrays['nms_ties/boxes'][order]), 0.5)
  np.testing.assert_array_equal(kept(found, order), arrays['nms_ties/keep_0.5'])


def greedy(ranked, threshold, valid, groups):
  """Suppression as everybody writes it first."""
  keep = []
  for i in range(len(ranked)):
    if not valid[i]:
      continue
    if keep:
      others = ranked[keep]
      sides = np.minimum(others[:, 2:], ranked[i, 2:]) - np.maximum(others[:, :2], ranked[i, :2])
      common = np.prod(np.maximum(sides, 0), axis=1)
      areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
      union = areas + np.prod(ranked[i, 2:] - ranked[i, :2]) - common
      if ((common > threshold * union) & (groups[keep] == groups[i])).any():
        continue
    keep.append(i)
  return keep


@pytest.mark.parametrize('crowd', [40, 200])
def test_suppression_of_thousands_of_boxes_equals_a_greedy_loop(crowd):
  rng = np.random.default_rng(crowd)
  corner = rng.integers(0, crowd, (2000, 2))  # integers: IoUs are the same on both sides
  ranked = np.concatenate([corner, corner + rng.integers(1, 60, (2000, 2))], 1).astype(np.float32)
  valid, groups = rng.random(2000) < 0.9, rng.integers(0, 3, 2000)
  found = jax.jit(nms.nms, static_argnums=1)(ranked, 0.5, valid, groups)
  expected = greedy(ranked, np.float32(0.5), valid, groups)
  assert 10 < len(expected) < 1700
  np.testing.assert_array_equal(np.flatnonzero(found), expected)


PROPOSALS = 70  # the most of any case


def padded(gt, slots=6):
  return np.pad(gt, ((0, slots - len(gt)), (0, 0))), np.arange(slots) < len(gt)


@functools.partial(jax.jit, static_argnums=4)
def _assigned(candidates, valid, gt, exists, rule):
  overlaps = boxes.iou(candidates, gt)
  return overlaps, assign.assign(overlaps, valid, exists, rule)


def assigned(*args):
  """Overlaps and assignment, compiled once for all cases."""
  return jax.device_get(_assigned(*args))


@pytest.mark.parametrize('case', ['normal', 'overlapping', 'tiny', 'ties', 'low_quality', 'none'])
@pytest.mark.parametrize('which', ['all', 'valid'])
def test_assignment_of_anchors_equals_the_official_one(case, which):
  _, arrays = load_golden('detection_assign.npz')
  valid = arrays['rpn/valid'] if which == 'valid' else np.ones(len(arrays['rpn/anchors']), bool)
  gt = padded(arrays[f'rpn/{case}/gt'])
  overlaps, found = assigned(arrays['rpn/anchors'], valid, *gt, RPN)
  expected = arrays[f'rpn/{case}/{which}/gt_inds']
  np.testing.assert_array_equal(found[valid], expected)
  assert (found[~valid] == assign.NEITHER).all()
  assert_close(overlaps[valid].max(axis=1), arrays[f'rpn/{case}/{which}/max_overlaps'])


@pytest.mark.parametrize('case', ['normal', 'overlapping', 'contested', 'tiny', 'none'])
def test_assignment_of_proposals_equals_the_official_one(case):
  _, arrays = load_golden('detection_assign.npz')
  proposals, valid = padded(arrays[f'rcnn/{case}/proposals'], PROPOSALS)
  overlaps, found = assigned(proposals, valid, *padded(arrays[f'rcnn/{case}/gt']), RCNN)
  np.testing.assert_array_equal(found[valid], arrays[f'rcnn/{case}/gt_inds'])
  assert_close(overlaps[valid].max(axis=1), arrays[f'rcnn/{case}/max_overlaps'])


@pytest.mark.parametrize('case', ['normal', 'overlapping', 'contested', 'tiny'])
def test_what_is_sampled_from_has_the_objects_first_each_its_own(case):
  """A sample that is large enough for all of it shows what it was drawn from."""
  _, arrays = load_golden('detection_assign.npz')
  proposals, valid = padded(arrays[f'rcnn/{case}/proposals'], PROPOSALS)
  objects, exists = padded(arrays[f'rcnn/{case}/gt'])
  count = len(objects) + len(proposals)
  draw = jax.jit(detection_targets.roi_sample, static_argnames='total')
  rois, sample = jax.device_get(
    draw(proposals, valid, objects, exists, np.linspace(0.9, 0.1, count), total=4 * count)
  )
  owners = np.full(count, assign.NEITHER)
  owners[sample.index[sample.valid]] = assign.BACKGROUND
  owners[sample.index[sample.positive]] = sample.object[sample.positive] + 1
  candidates = np.concatenate([objects, proposals])
  np.testing.assert_array_equal(rois[sample.valid], candidates[sample.index[sample.valid]])
  real = np.concatenate([exists, valid])
  assert (owners[~real] == assign.NEITHER).all()
  np.testing.assert_array_equal(owners[real], arrays[f'rcnn/{case}/with_gt/gt_inds'])
  labels = np.where(owners[real] > 0, arrays[f'rcnn/{case}/labels'][owners[real] - 1], -1)
  np.testing.assert_array_equal(labels, arrays[f'rcnn/{case}/with_gt/assigned_labels'])


def test_the_order_of_objects_changes_nothing_but_their_numbers():
  _, arrays = load_golden('detection_assign.npz')
  everything = jnp.ones(len(arrays['rpn/anchors']), bool)
  gt = arrays['rpn/normal/gt']
  order = np.array([2, 0, 1])

  def owners(gt):
    overlaps = boxes.iou(jnp.asarray(arrays['rpn/anchors']), jnp.asarray(gt))
    return np.asarray(assign.assign(overlaps, everything, jnp.ones(len(gt), bool), RPN))

  straight, permuted = owners(gt), owners(gt[order])
  assert (straight > 0).any()
  number = np.array([-1, 0, *order + 1])  # of what the permuted ones say, from -1 on
  np.testing.assert_array_equal(straight, number[permuted + 1])


def test_a_sample_has_the_positives_first_and_fills_up_with_negatives():
  assigned = jnp.array([0, 3, -1, 0, 1, 0, 2, 0])
  priorities = jnp.array([0.1, 0.9, 0.99, 0.8, 0.2, 0.7, 0.5, 0.0])
  found = assign.sample(assigned, priorities, positives=2, total=5)
  assert found.index.tolist() == [1, 6, 3, 5, 0]
  assert found.valid.all()
  assert found.positive.tolist() == [True, True, False, False, False]
  assert found.object.tolist()[:2] == [2, 1]


def test_empty_slots_stand_behind_what_there_is_to_sample():
  found = assign.sample(jnp.array([0, -1, 2]), jnp.array([0.5, 0.9, 0.1]), positives=4, total=8)
  assert found.index.tolist()[:2] == [2, 0]
  assert found.valid.tolist() == [True, True] + 6 * [False]
  assert found.positive.tolist() == [True] + 7 * [False]


def test_every_positive_is_as_likely_to_be_sampled():
  assigned = jnp.array(4 * [1] + 4 * [0])

  def positives(key):
    found = assign.sample(assigned, jax.random.uniform(key, (8,)), positives=2, total=4)
    return jnp.zeros(8).at[found.index].add(found.valid)

  shares = jax.vmap(positives)(jax.random.split(jax.random.key(0), 2000)).mean(axis=0)
  np.testing.assert_allclose(shares, 0.5, atol=0.05)
