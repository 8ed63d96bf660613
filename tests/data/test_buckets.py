"""Batches of one canvas each: planned from sizes and a seed, the same on every host."""

import collections
import pickle

import numpy as np
import pytest

from hivit_jax.data import buckets
from hivit_jax.data import detection_transforms as transforms
from hivit_jax.data.loader import eval_loader, train_loader
from hivit_jax.data.order import generator
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from tests.data import coco_on_disk as on_disk
from tests.data.scenes_on_disk import put

PUBLISHED = transforms.Augmentation(
  short=tuple(range(480, 801, 32)), long=1333, first=(400, 500, 600)
)
LANDSCAPE = ((544, 832), (672, 1024), (800, 1088), (800, 1344))
CANVASES = LANDSCAPE + tuple((w, h) for h, w in LANDSCAPE)
SMALL = transforms.Augmentation(short=(32, 48, 64), long=96, first=(40, 50), crop=(24, 40))
SMALL_CANVASES = ((64, 96), (96, 64), (32, 64), (64, 32))
BATCH = 8


def sizes(count=203, seed=0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return np.stack([rng.integers(300, 641, count), rng.integers(300, 641, count)], axis=1)


def published(count=203, seed=5) -> buckets.Bucketed:
  return buckets.Bucketed(sizes(count), PUBLISHED.sizes, CANVASES, batch_size=BATCH, seed=seed)


def positions(step: int) -> range:
  return range(step * BATCH, (step + 1) * BATCH)


def test_sizes_of_many_images_are_those_of_their_chains():
  for augmentation in (PUBLISHED, transforms.Augmentation((90, 100), 120)):
    known, draws = sizes(), np.random.default_rng(1).random((203, transforms.DRAWS))
    expected = [
      augmentation.draw((int(h), int(w)), own).size((int(h), int(w)))
      for (h, w), own in zip(known, draws, strict=True)
    ]
    np.testing.assert_array_equal(augmentation.sizes(known, draws), expected)


def test_a_step_is_of_one_canvas_and_its_images_fit_on_no_smaller_one():
  order = published()
  seen = set()
  for step in range(60):
    given = [order.given(p, order.example(p)) for p in positions(step)]
    shapes = {own['shape'] for own in given}
    assert len(shapes) == 1
    seen |= shapes
    height, width = next(iter(shapes))
    for p, own in zip(positions(step), given, strict=True):
      size = PUBLISHED.sizes(sizes()[[order.example(p)]], own['draws'][None])[0]
      fitting = [h * w for h, w in CANVASES if h >= size[0] and w >= size[1]]
      assert min(fitting) == height * width
  assert seen <= set(CANVASES)
  assert len(seen) >= 6


def test_every_example_comes_once_in_every_epoch_up_to_those_that_wait_for_a_batch():
  order, count = published(), 203
  steps = 10 * count // BATCH
  found = [order.example(p) for step in range(steps) for p in positions(step)]
  times = collections.Counter(found)
  waiting = len(CANVASES) * (BATCH - 1)
  assert set(times) == set(range(count))
  assert sum(max(10 - times[i], 0) for i in range(count)) <= waiting
  # By epoch: an example of an epoch has that epoch's random numbers, and comes with them once.
  keys = [
    (order.example(p), order.given(p, order.example(p))['draws'].tobytes())
    for step in range(steps)
    for p in positions(step)
  ]
  assert len(set(keys)) == len(keys)


def test_a_step_is_a_function_of_seed_and_step():
  order = published()
  plan = [(order.example(p), order.given(p, 0)['shape']) for s in range(70) for p in positions(s)]
  late = pickle.loads(pickle.dumps(published()))  # asked for the last step first
  assert [(late.example(p), late.given(p, 0)['shape']) for p in positions(69)] == plan[-BATCH:]
  assert [late.example(p) for s in range(70) for p in positions(s)] == [i for i, _ in plan]
  other = published(seed=6)
  assert [other.example(p) for s in range(70) for p in positions(s)] != [i for i, _ in plan]


def test_a_replacement_fits_on_the_canvas_of_its_step():
  order = published()
  for position in range(0, 400, 7):
    shape = order.given(position, order.example(position))['shape']
    index = order.replacement(position, generator(5, position))
    given = order.given(position, index)
    size = PUBLISHED.sizes(sizes()[[index]], given['draws'][None])[0]
    assert given['shape'] == shape
    assert (size <= shape).all()


class OneBroken:
  """Six examples; the first, alone on the larger canvas, cannot be read."""

  name, split, class_names, num_classes = 'some', 'train', (), 0
  sizes = np.array([[64, 64], *[[32, 32]] * 5])

  def __len__(self):
    return 6

  def __getitem__(self, index):
    if index == 0:
      raise OSError('damaged')
    return {'index': index}

  def example_name(self, index):
    return f'example {index}'


def test_a_broken_example_that_is_alone_in_its_bucket_ends_nothing():
  source, canvases = OneBroken(), ((64, 64), (32, 32))

  def transform(example, rng=None, *, shape, draws=None):
    return {'canvas': np.array(shape), 'place': np.array(example['index'])}

  order = buckets.Bucketed(source.sizes, lambda sizes, draws: sizes, canvases, batch_size=2, seed=0)
  options = {'batch_size': 2, 'seed': 0, 'num_steps': 12, 'max_broken_fraction': 1.0}
  with train_loader(source, transform, order=order, **options) as loader:
    places = [batch['place'].tolist() for batch in loader if (batch['canvas'] == 64).all()]
  assert places
  assert all(place > 0 for pair in places for place in pair)
  order = buckets.BucketedPass.of(source.sizes, canvases, 2)
  with eval_loader(source, transform, batch_size=2, order=order, max_broken_fraction=1.0) as loader:
    first, *others = loader
  assert first['canvas'].tolist() == [[0, 0]] * 2  # padding like an example that fits
  assert not first['mask'].any()
  assert sorted(i for b in others for i in b['index'][b['mask']]) == [1, 2, 3, 4, 5]


def test_few_examples_fill_batches_from_several_epochs():
  order = buckets.Bucketed(sizes(3), PUBLISHED.sizes, CANVASES, batch_size=BATCH, seed=0)
  found = [order.example(p) for step in range(6) for p in positions(step)]
  assert set(found) == {0, 1, 2}


def test_canvases_that_are_too_small_are_named():
  order = buckets.Bucketed(sizes(), PUBLISHED.sizes, CANVASES[:2], batch_size=BATCH, seed=0)
  with pytest.raises(UserError, match=r'would become \d+x\d+ .* 544x832, 672x1024 of config'):
    order.example(0)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  content = on_disk.annotated(17)
  files = on_disk.files_of(content, 'train', 'annotations/train.json')
  return open_source(f'coco:{put(tmp_path_factory.mktemp("coco"), files)}', 'train')


def load(source, **options) -> list[dict]:
  order = buckets.Bucketed(
    source.scenes[:, :2], SMALL.sizes, SMALL_CANVASES, batch_size=BATCH, seed=3
  )
  transform = transforms.TrainTransform(SMALL, (96, 96), slots=4)
  settings = {'batch_size': BATCH, 'seed': 3, 'num_steps': 6, 'max_broken_fraction': 1.0}
  with train_loader(source, transform, order=order, **settings | options) as loader:
    return list(loader)


def test_the_transform_gives_what_the_plan_said_on_any_number_of_hosts(source):
  whole = load(source)
  order = buckets.Bucketed(
    source.scenes[:, :2], SMALL.sizes, SMALL_CANVASES, batch_size=BATCH, seed=3
  )
  for step, batch in enumerate(whole):
    for row, position in enumerate(positions(step)):
      index = order.example(position)
      given = order.given(position, index)
      assert batch['image'].shape[1:3] == given['shape']
      expected = SMALL.sizes(source.scenes[[index], :2], given['draws'][None])[0]
      assert batch['size'][row].tolist() == expected.tolist()
  hosts = [load(source, process_index=i, process_count=2, start_step=2) for i in range(2)]
  for one, two, expected in zip(*hosts, whole[2:], strict=False):
    for key, value in expected.items():
      np.testing.assert_array_equal(np.concatenate([one[key], two[key]]), value)
  assert len({batch['image'].shape for batch in whole}) > 1


def test_an_evaluation_sees_every_example_once_on_the_canvas_of_its_size(source):
  transform = transforms.EvalTransform(48, 96, (96, 96))
  known = transforms.fitted_sizes(source.scenes[:, :2], 48, 96)
  canvases = ((64, 64), (64, 96), (96, 64))
  order = buckets.BucketedPass.of(known, canvases, 4)
  with eval_loader(source, transform, batch_size=4, order=order) as loader:
    batches = list(loader)
  assert len(batches) == order.steps
  seen = np.concatenate([batch['index'][batch['mask']] for batch in batches])
  assert sorted(seen.tolist()) == list(range(17))
  for batch in batches:
    for i, real, size in zip(batch['index'], batch['mask'], batch['size'], strict=True):
      assert size.tolist() == (known[i].tolist() if real else [0, 0])
    assert (batch['size'] <= batch['image'].shape[1:3]).all()
  # Evaluating on several hosts gives the rows of one, padding among them.
  parts = []
  for host in range(2):
    options = {'process_index': host, 'process_count': 2, 'order': order}
    with eval_loader(source, transform, batch_size=4, **options) as loader:
      parts.append(list(loader))
  for one, two, whole in zip(*parts, batches, strict=True):
    for key, value in whole.items():
      np.testing.assert_array_equal(np.concatenate([one[key], two[key]]), value)
