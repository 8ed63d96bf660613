"""What an evaluation of detectors leaves, and how the task asks for its batches."""

import contextlib
import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.data import coco, detection_transforms
from hivit_jax.data.detection_transforms import ScaleJitter
from hivit_jax.data.sources import subset
from hivit_jax.errors import UserError
from hivit_jax.tasks import detect, detection_evaluation
from hivit_jax.train import inputs
from tests.helpers import random_model
from tests.tasks.test_detection_results import BOXES, SIZE, OwnIds, found

TASK = detect.DetectTask((0.5,) * 3, (0.5,) * 3, num_classes=2)


class Known(nnx.Module):
  """Finds the true objects, moved by its parameter."""

  def __init__(self):
    self.shift = nnx.Param(jnp.zeros(()))


@dataclasses.dataclass(frozen=True)
class FindsThem:
  channels: int = 3

  def detections(self, model, batch):
    wanted = {key: jnp.asarray(value)[batch['index']] for key, value in found().items()}
    return wanted | {'boxes': wanted['boxes'] + model.shift[...]}


class Context:
  """Of one process without a workdir; the second batch has padding before its example."""

  def __init__(self, graphdef):
    self.graphdef, self.kept, self.stored = graphdef, {}, {}

  @contextlib.contextmanager
  def batches(self, source, transform=None):
    yield iter(
      [
        {'mask': np.array([False, True]), 'index': np.array([-1, 1])},
        {'mask': np.array([True, False]), 'index': np.array([0, -1])},
      ]
    )

  def whole(self, params):
    return params

  def fetch(self, array):
    return np.asarray(array)

  def keep(self, step, name, text, data):
    self.kept[name] = step, text, json.loads(data)

  def store(self, name, data):
    self.stored[name] = json.loads(data)


def test_parameters_and_their_average_leave_tables_and_results_in_the_ids_of_the_set():
  graphdef, params = nnx.split(Known())
  params = nnx.to_pure_dict(params)
  context = Context(graphdef)
  evaluator = detection_evaluation.Measured(context, FindsThem(), OwnIds(), 'eval')
  for _ in range(2):  # nothing is left from the first time
    metrics = evaluator(7, {'params': params, 'ema': {'shift': jnp.asarray(6.0)}})
  assert evaluator.found(6) is None
  assert evaluator.found(7)[0][0]['bbox'][0] == BOXES[0][0]  # of the parameters, not the average
  assert metrics['eval/box_ap'] == metrics['eval/mask_ap'] == pytest.approx(1)
  assert 0 < metrics['eval/ema_box_ap'] < 1
  assert 'eval/mask_ap_large' not in metrics
  assert context.kept.keys() == {'eval_detections', 'eval_ema_detections'}
  step, text, data = context.kept['eval_detections']
  assert step == 7
  assert text.splitlines()[1].split() == ['ap', '100.00', '100.00']
  assert data['box_ap'] == pytest.approx(1)
  assert [row['class'] for row in data['classes']] == ['round', 'square']
  names = {f'eval_{prefix}{kind}.json' for prefix in ('', 'ema_') for kind in ('boxes', 'masks')}
  assert context.stored.keys() == names
  boxes = context.stored['eval_boxes.json']
  assert [(row['image_id'], row['category_id']) for row in boxes] == [
    (500, 7), (500, 90), (501, 7), (501, 90)
  ]  # fmt: skip
  left, top, right, bottom = BOXES[0].tolist()
  assert boxes[0]['bbox'] == [left, top, right - left, bottom - top]
  assert context.stored['eval_ema_boxes.json'][0]['bbox'][0] == left + 3  # of half the size
  mask = coco.decode(context.stored['eval_masks.json'][0]['segmentation'], SIZE)
  assert mask[int(top) : int(bottom), int(left) : int(right)].all()


class Five(OwnIds):
  """Five images, each of one grey value."""

  name, split, num_classes = 'five', 'val', 2

  def __len__(self):
    return 5

  def __getitem__(self, index):
    return super().__getitem__(0) | {'image': np.full((*SIZE, 3), 40 * index, np.uint8)}


def test_pictures_show_beside_each_image_what_was_measured_in_it(monkeypatch):
  """Three of five images are drawn, and what an evaluation found in them is not computed again."""

  class Measured:
    def found(self, step):
      return {i: [{'category_id': i, 'score': s} for s in (0.9, 0.2)] for i in (4, 0, 2)}

  drawn, sheets = [], []
  context = Context(graphdef=None)
  context.sets, context.model_name = {'eval': Five()}, 'model'
  context.setting = {'pictures.count': 3}.get
  context.some = subset.spread
  context.draw = lambda step, name, sheet: sheets.append((step, name, sheet))
  pictures = detection_evaluation.detection_pictures
  monkeypatch.setattr(
    pictures, 'draw', lambda image, objects, *_: drawn.append((image, objects)) or len(drawn)
  )
  monkeypatch.setattr(pictures, 'sheet', lambda pairs, *_: pairs)
  draw = detection_evaluation._pictures(context, TASK, Measured())
  assert draw(7, {'params': {}}) == {}
  assert sheets == [(7, 'detections', [(1, 2), (3, 4), (5, 6)])]
  for place, (image, truth), (same, shown) in zip((0, 2, 4), drawn[::2], drawn[1::2], strict=True):
    assert np.all(image == 40 * place)
    assert np.all(same == 40 * place)
    assert len(truth) == len(BOXES)
    assert [(one['category_id'], one['score']) for one in shown] == [(place, 0.9)]


def test_swin_takes_images_of_any_size_on_the_canvas_of_the_model(monkeypatch):
  monkeypatch.setattr(jax, 'jit', jax.jit)
  graphdef, params = random_model(
    'detect_swin_tiny', image_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
    window_size=2, num_classes=2, neck_channels=8, hidden=16, nms_pre=(32, 32), proposals=16,
    detections=4, candidates=64,
  )  # fmt: skip
  task = dataclasses.replace(TASK, image_size=(64, 64), eval_short_side=40, long_side=64)
  detect = detection_evaluation.Detector(graphdef, task)
  found = 0
  for height, width in ((40, 50), (90, 20)):
    objects = detect(params, np.full((height, width, 3), 77, np.uint8))
    found += len(objects)
    for left, top, across, down in (one['bbox'] for one in objects):
      assert 0 <= left <= left + across <= width + 1e-2
      assert 0 <= top <= top + down <= height + 1e-2
  assert found > 0


def test_single_images_of_all_shapes_are_on_21_canvases():
  """Of the published sizes; each canvas is a program, and the guide has their number."""
  sides = np.arange(1, 1600)
  shapes = np.stack([sides, np.full_like(sides, 600)], axis=1)
  sizes = detection_transforms.fitted_sizes(
    np.concatenate([shapes, shapes[:, ::-1], 10 * shapes]), TASK.eval_short_side, TASK.long_side
  )
  canvases = {detection_evaluation.canvas_of((h, w)) for h, w in sizes.tolist()}
  assert len(canvases) == 21
  assert (896, 896) in canvases
  assert {max(canvas) for canvas in canvases if min(canvas) < 896} == {1408}


class Sizes:
  name, split, class_names, num_classes = 'some', 'train', ('a',), 1

  def __init__(self, objects):
    self.scenes = np.array([[480, 640, n] for n in objects], np.int32)

  def __len__(self):
    return len(self.scenes)

  def __getitem__(self, index):
    return {'place': index}


def test_batches_are_in_buckets_where_sizes_are_known():
  canvases = ((800, 1344), (1344, 800))
  task = dataclasses.replace(TASK, buckets=canvases, eval_buckets=canvases)
  source = Sizes([1] * 9)
  order = task.order(source, seed=0, batch_size=4)
  assert order.given(0, order.example(0))['shape'] in canvases
  assert task.eval_order(source, 4).steps == 3
  unknown = object()
  assert task.order(unknown, 0, 4) is task.eval_order(unknown, 4) is None
  assert TASK.order(source, 0, 4) is TASK.eval_order(source, 4) is None
  with pytest.raises(UserError, match=r'detect\.buckets=.*multiples of 32'):
    dataclasses.replace(TASK, buckets=((800, 1333),))


def test_jitter_takes_the_place_of_the_published_augmentation_on_a_square():
  task = dataclasses.replace(TASK, scale_jitter=(0.1, 2.0), image_size=(64, 64), flip=False)
  assert task.input(train=True).augmentation == ScaleJitter((0.1, 2.0), 64, flip=False)
  with pytest.raises(UserError, match=r'needs a square canvas, .* 64x96; try .*image_size=96'):
    dataclasses.replace(task, image_size=(64, 96))


def test_each_canvas_is_told_when_it_compiles(caplog):
  with caplog.at_level(logging.INFO):
    detect._tell('the training step', (800, 1088), ((544, 832), (800, 1088)))
    detect._tell('the training step', (64, 64), ())
  assert [r.getMessage() for r in caplog.records] == [
    'compiling the training step for 800x1088 (2 of 2)'
  ]


def test_training_leaves_out_what_has_no_object():
  source = Sizes([2, 0, 1, 0])
  kept = inputs.with_objects(source)
  assert [kept[i]['place'] for i in range(len(kept))] == [0, 2]
  assert kept.scenes[:, 2].tolist() == [2, 1]
  full = Sizes([1, 1])
  assert inputs.with_objects(full) is full
  with pytest.raises(UserError, match=r'some \(train\) has no object to learn from'):
    inputs.with_objects(Sizes([0, 0]))
