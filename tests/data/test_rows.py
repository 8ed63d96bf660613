"""Rows of any keys become batches: stacked, in lists where they may differ, or refused."""

import re

import numpy as np
import pytest

from hivit_jax.data import fields, transforms
from hivit_jax.data.loader import eval_loader, train_loader
from hivit_jax.errors import UserError
from tests.data.noise import Noise

KEYS = ('image', 'segmentation', 'label')
LENGTH = 70  # Two chunks a batch of 64, and a rest.
ARRAY = np.zeros((2, 3), np.uint8)


class Ragged:
  """Pixels at full size; `count` says how many."""

  ragged = True

  def __call__(self, example: dict) -> dict:
    pixels = np.asarray(fields.decode(example, ('image',), 3)['image'])
    return {'pixels': pixels, 'count': np.int32(pixels.size)}


class Fixed:
  """Returns one thing, and another for some examples."""

  def __init__(self, usual, other, others=range(40, 100)):
    self.usual, self.other, self.others = usual, other, others

  def __call__(self, example: dict, rng=None):
    return self.other if example['label'] in self.others else self.usual


def test_every_key_of_a_training_transform_is_stacked():
  transform = transforms.train_transform((16, 24), keys=KEYS)
  with train_loader(Noise(LENGTH), transform, batch_size=64, seed=0) as loader:
    batch = next(loader)
  assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
    'image': (np.uint8, (64, 16, 24, 3)),
    'segmentation': (np.uint8, (64, 16, 24)),
    'label': (np.int32, (64,)),
  }
  assert (np.diff(np.sort(batch['label'])) > 0).all()


@pytest.mark.parametrize('hosts', [1, 4])
def test_every_key_is_stacked_in_evaluation_and_0_where_there_is_no_example(hosts):
  source, transform = Noise(LENGTH, broken=[3]), transforms.eval_transform((16, 24), keys=KEYS)
  found = {}
  for i in range(hosts):
    settings = {'process_index': i, 'process_count': hosts, 'max_broken_fraction': 0.1}
    with eval_loader(source, transform, batch_size=64, **settings) as loader:
      for batch in loader:  # The last one of some hosts is all padding.
        assert batch.keys() == {*KEYS, 'mask', 'index'}
        assert batch['segmentation'].shape == (64 // hosts, 16, 24)
        for key in KEYS:
          assert not batch[key][~batch['mask']].any()
        for row in np.flatnonzero(batch['mask']):
          found[int(batch['index'][row])] = batch['segmentation'][row]
  assert sorted(found) == [i for i in range(LENGTH) if i != 3]
  for index, labels in found.items():
    np.testing.assert_array_equal(labels, transform(source[index])['segmentation'])


@pytest.mark.parametrize('options', [{}, {'num_workers': 1}], ids=['threads', 'a worker'])
def test_rows_of_a_ragged_transform_come_as_lists(options):
  source = Noise(LENGTH, broken=[3])
  settings = {'batch_size': 64, 'max_broken_fraction': 0.1} | options
  with eval_loader(source, Ragged(), **settings) as loader:
    batches = list(loader)
  assert [len(batch['pixels']) for batch in batches] == [64, 64]
  seen = 0
  for batch in batches:
    assert isinstance(batch['pixels'], list)
    assert batch['count'].shape == batch['mask'].shape == (64,)  # Scalars are stacked.
    for row, index in enumerate(batch['index']):
      if batch['mask'][row]:
        np.testing.assert_array_equal(batch['pixels'][row], Ragged()(source[index])['pixels'])
        assert batch['count'][row] == batch['pixels'][row].size
        seen += 1
      else:
        assert not batch['pixels'][row].any()
  assert seen == LENGTH - 1
  assert len({pixels.shape for pixels in batches[0]['pixels']}) > 20


def test_ragged_is_of_no_effect_in_training():
  transform = Fixed({'x': np.zeros(3)}, {'x': np.zeros(4)})
  transform.ragged = True
  with pytest.raises(UserError, match=r"'x' of float64 \((3|4),\)"):
    list(train_loader(Noise(LENGTH), transform, batch_size=64, seed=0))


@pytest.mark.parametrize('batch_size', [64, 200], ids=['in a chunk', 'between chunks'])
@pytest.mark.parametrize(
  ('other', 'shown'),
  [
    ({'x': ARRAY.T, 'y': ARRAY}, [r"'x' of uint8 \(2, 3\)", r'of uint8 \(3, 2\)']),
    ({'x': ARRAY, 'y': ARRAY[0]}, [r"'y' of uint8 \(2, 3\)", r'of uint8 \(3,\)']),
    ({'x': ARRAY, 'y': ARRAY + 0.5}, [r"'y' of uint8 \(2, 3\)", r'of float64 \(2, 3\)']),
    ({'x': ARRAY}, ['x, y(?:, mask, index)?', 'x(?:, mask, index)?']),
  ],
  ids=['shape', 'dimensions', 'type', 'keys'],
)
def test_rows_that_differ_are_one_error_with_two_examples_the_key_and_both(
  batch_size, other, shown
):
  # 200 rows are 7 chunks, the third of which begins at 57.
  others = range(15, 64) if batch_size == 64 else range(57, 200)
  transform = Fixed({'x': ARRAY, 'y': ARRAY}, other, others)
  with pytest.raises(UserError) as error:
    list(eval_loader(Noise(200, sizes=[(8, 8)] * 200), transform, batch_size=batch_size))
  one, two = (rf'{what} from noise/(\d+)\.png' for what in shown)
  found = re.match(rf'the transform makes {one}, but {two}: ', str(error.value))
  assert int(found[1]) not in others
  assert int(found[2]) in others
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('row', 'error', 'message'),
  [
    (ARRAY, RuntimeError, r'noise/0\.png: TypeError: the transform returned a ndarray, not a dict'),
    ({'name': 'x'}, RuntimeError, "the transform returned 'name' as <U1, not as numbers"),
    ({'objects': {'boxes': []}}, RuntimeError, "returned 'objects' as object, not as numbers"),
    ({'mask': ARRAY}, UserError, "'mask' in what an evaluation transform returns"),
  ],
)
def test_what_no_batch_can_be_made_of_is_refused(row, error, message):
  with pytest.raises(error, match=message):
    list(eval_loader(Noise(3), Fixed(row, row), batch_size=4))


def test_padding_without_any_readable_example_is_an_error():
  source, transform = Noise(5, broken=range(5)), transforms.eval_transform(8)
  with pytest.raises(UserError, match=r'5 examples of noise \(train\), .* are all broken'):
    list(eval_loader(source, transform, batch_size=4, max_broken_fraction=1))
