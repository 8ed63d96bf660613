"""Orders: what stands where, and steps that differ in shape."""

import collections
import hashlib
import pickle

import numpy as np
import pytest

from hivit_jax.data import transforms
from hivit_jax.data.loader import eval_loader, train_loader
from hivit_jax.data.order import Shuffled, epoch_order, generator
from tests.data.grouped import Grouped
from tests.data.noise import Noise

SHAPES = ((16, 24), (24, 16))
GROUPED = Grouped(tuple(SHAPES[i % 3 == 0] for i in range(25)), batch_size=8, seed=4)


def digest(batches) -> str:
  """Of images and labels, with shapes and types."""
  state = hashlib.sha256()
  for batch in batches:
    for key in ('image', 'label'):
      state.update(batch[key].tobytes())
      state.update(str((batch[key].shape, batch[key].dtype)).encode())
  return state.hexdigest()[:16]


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    ({}, 'bf57c90cf4009e49'),
    ({'channels': 1}, 'baa135a9aea876e5'),
    ({'interpolation': 'bilinear', 'clamp': True}, '2e3e15b5b1adf611'),
    ({'scale': (0.08, 1), 'rand_augment': 'rand-m9-mstd0.5-inc1'}, '63cb6c8f89794659'),
    ({'color_jitter': 0.4}, '2f1750f861c57ec3'),
  ],
)
def test_the_stream_of_a_seed_stays_what_it_is(options, expected):
  """Bit for bit, so that a run goes on under another version of this package as it began."""
  transform = transforms.train_transform((32, 48), **options)
  settings = {'batch_size': 8, 'seed': 3, 'start_step': 2, 'num_steps': 5}
  with train_loader(Noise(30, [7]), transform, max_broken_fraction=0.1, **settings) as loader:
    assert digest(loader) == expected
  assert loader.broken


@pytest.mark.parametrize(
  ('crop', 'expected'), [(None, 'f2b602bbcd00cc38'), (0.8, '2a3c95d723ea6997')]
)
def test_what_is_evaluated_stays_what_it_is(crop, expected):
  transform = transforms.eval_transform((32, 48), crop)
  with eval_loader(Noise(30, [7]), transform, batch_size=8, max_broken_fraction=0.1) as loader:
    assert digest(loader) == expected


def test_shuffled_is_one_permutation_after_another():
  order = pickle.loads(pickle.dumps(Shuffled(10, seed=3)))
  epochs = np.reshape([order.example(position) for position in range(20)], (2, 10))
  np.testing.assert_array_equal(epochs, [epoch_order(10, 3, epoch) for epoch in (0, 1)])
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (2, 1)))
  assert order.given(0, 0) == {}
  replacements = [order.replacement(0, generator(3, position)) for position in range(200)]
  assert set(replacements) == set(range(10))


# Steps of several shapes.


def load(*, order=GROUPED, broken=(), **options) -> list[dict]:
  """Eight steps; every label says which example a row is."""
  source = Noise(len(order.shapes), broken, sizes=order.shapes)
  transform = transforms.train_transform(8, scale=(1, 1), ratio=(1, 1))
  settings = {'batch_size': order.batch_size, 'seed': 1, 'num_steps': 8, 'max_broken_fraction': 0.5}
  with train_loader(source, transform, order=order, **settings | options) as loader:
    return list(loader)


def test_every_step_has_one_shape_and_every_epoch_all_examples():
  steps = load(num_steps=2 * GROUPED.epoch_steps)
  assert {step['image'].shape for step in steps} == {(8, 16, 24, 3), (8, 24, 16, 3)}
  for number, step in enumerate(steps):
    assert step['image'].shape[1:3] == GROUPED.shape(number)
    assert {GROUPED.shapes[label] for label in step['label']} == {GROUPED.shape(number)}
  epochs = np.split(np.concatenate([step['label'] for step in steps]), 2)
  for epoch in epochs:
    counts = collections.Counter(epoch.tolist())
    assert set(counts) == set(range(25))
    assert sum(counts.values()) - len(counts) == GROUPED.repeated == 7  # 9 and 16, in steps of 8
  assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize('options', [{}, {'num_workers': 1}], ids=['threads', 'a worker'])
def test_two_hosts_load_the_batches_of_one(options):
  expected = load()
  hosts = [load(process_index=i, process_count=2, **options) for i in range(2)]
  for whole, *parts in zip(expected, *hosts, strict=True):
    for key in ('image', 'label'):
      np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])


def test_any_step_loads_without_those_before_it():
  expected = load()
  for start in (1, 5):
    for step, whole in zip(load(start_step=start, num_steps=3), expected[start:], strict=False):
      np.testing.assert_array_equal(step['image'], whole['image'])
  assert len(load(start_step=10**9, num_steps=1)) == 1


def test_a_broken_example_is_replaced_by_one_of_its_shape():
  broken = [0, 1, 2, 3]
  for number, step in enumerate(load(broken=broken)):
    assert not set(broken) & set(step['label'].tolist())
    assert {GROUPED.shapes[label] for label in step['label']} == {GROUPED.shape(number)}


def test_an_order_is_the_same_after_pickling():
  copy = pickle.loads(pickle.dumps(GROUPED))
  assert [copy.example(p) for p in range(200)] == [GROUPED.example(p) for p in range(200)]
