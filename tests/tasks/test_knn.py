"""The k-NN classifier against one written plainly."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.tasks import knn
from hivit_jax.tasks import neighbours as voting
from hivit_jax.tasks.neighbours import Neighbours


def knn_predict(bank, labels, queries, *, num_classes, k=20, temperature=0.07):
  """Predictions from a bank that is in memory."""
  neighbours = Neighbours(queries, k=k, bank_size=len(bank))
  neighbours.add(bank, labels)
  return neighbours.predict(num_classes=num_classes, temperature=temperature)


def _plain(bank, labels, queries, *, num_classes, k=20, temperature=0.07):
  predicted = []
  for query in queries.astype(np.float64):
    similarity = [
      x @ query / (np.linalg.norm(x) * np.linalg.norm(query)) for x in bank.astype(np.float64)
    ]
    nearest = np.argsort(similarity)[::-1][:k]
    votes = np.zeros(num_classes)
    for i in nearest:
      votes[labels[i]] += np.exp(similarity[i] / temperature)
    predicted.append(votes.argmax())
  return np.array(predicted)


def _data(examples, queries, classes=5, width=6, seed=0):
  """Classes that overlap, of lengths that would mislead anything but a cosine."""
  rng = np.random.default_rng(seed)
  centres = rng.standard_normal((classes, width))

  def draw(count):
    labels = rng.integers(classes, size=count)
    x = centres[labels] + rng.standard_normal((count, width))
    return (x * rng.uniform(0.1, 10, (count, 1))).astype(np.float32), labels

  return *draw(examples), *draw(queries)


@pytest.mark.parametrize(
  'options', [{}, {'k': 1}, {'k': 7, 'temperature': 1.0}, {'k': 40, 'temperature': 0.02}], ids=str
)
def test_equals_a_plain_implementation(options):
  bank, labels, queries, truth = _data(200, 60)
  predicted = knn_predict(bank, labels, queries, num_classes=5, **options)
  expected = _plain(bank, labels, queries, num_classes=5, **options)
  np.testing.assert_array_equal(predicted, expected)
  assert 0.3 < np.mean(predicted == truth) < 1  # neither chance nor trivial


def test_the_options_matter():
  bank, labels, queries, _ = _data(200, 60)
  predicted = [
    tuple(knn_predict(bank, labels, queries, num_classes=5, k=k, temperature=t))
    for k, t in ((1, 0.07), (40, 0.07), (40, 10.0))
  ]
  assert len(set(predicted)) == 3


def test_a_voter_more_outweighs_only_at_a_high_temperature():
  bank = np.array([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]], np.float32)
  labels, query = np.array([0, 1, 1]), np.array([[1.0, 0.0]], np.float32)
  near = knn_predict(bank, labels, query, num_classes=2, k=3, temperature=0.07)
  many = knn_predict(bank, labels, query, num_classes=2, k=3, temperature=10.0)
  assert (near.item(), many.item()) == (0, 1)


@pytest.mark.parametrize('queries', [1, 7, 8, 9, 20])
def test_queries_in_chunks(monkeypatch, queries):
  monkeypatch.setattr(voting, '_CHUNK', 8)
  bank, labels, given, _ = _data(50, queries)
  predicted = knn_predict(bank, labels, given, num_classes=5)
  np.testing.assert_array_equal(predicted, _plain(bank, labels, given, num_classes=5))


def test_no_queries():
  bank, labels, _, _ = _data(10, 1)
  predicted = knn_predict(bank, labels, np.zeros((0, 6), np.float32), num_classes=5)
  assert predicted.shape == (0,)
  assert predicted.dtype == np.int32


def test_more_neighbours_than_the_bank_has():
  bank, labels, queries, _ = _data(9, 10)
  predicted = knn_predict(bank, labels, queries, num_classes=5, k=1000)
  np.testing.assert_array_equal(predicted, _plain(bank, labels, queries, num_classes=5, k=9))


def test_ties_go_to_the_first_class():
  bank = np.ones((4, 3), np.float32)
  predicted = knn_predict(bank, np.array([3, 2, 2, 3]), bank[:1], num_classes=5, k=4)
  assert predicted.item() == 2


def test_features_of_zero_and_extreme_temperatures():
  bank, labels, queries, _ = _data(50, 20)
  queries[0] = 0
  bank[0] = 0
  predicted = knn_predict(bank, labels, queries, num_classes=5, k=5, temperature=1e-4)
  nearest = knn_predict(bank, labels, queries, num_classes=5, k=1)
  np.testing.assert_array_equal(predicted[1:], nearest[1:])
  assert ((predicted >= 0) & (predicted < 5)).all()


def test_bfloat16_features():
  bank, labels, queries, _ = _data(200, 60)
  bank, queries = bank.astype(jnp.bfloat16), queries.astype(jnp.bfloat16)
  predicted = knn_predict(bank, labels, queries, num_classes=5)
  expected = _plain(bank, labels, queries, num_classes=5)
  np.testing.assert_array_equal(predicted, expected)


def _exact(count, seed):
  """Features whose similarities are exact in float32, most of them shared by several rows."""
  rng = np.random.default_rng(seed)
  features = np.zeros((count, 16), np.float32)
  for row in features:
    row[rng.choice(16, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
  return features, rng.integers(7, size=count)


@pytest.mark.parametrize('step', [1, 3, 8, 9, 100])
def test_a_bank_in_parts_is_the_whole_bank_to_the_bit(monkeypatch, step):
  bank, labels = _exact(100, seed=0)
  queries, _ = _exact(23, seed=1)
  whole = Neighbours(queries, k=5, bank_size=100)
  whole.add(bank, labels)
  expected = whole.predict(num_classes=7, temperature=0.07)
  monkeypatch.setattr(voting, '_PART', 8)
  monkeypatch.setattr(voting, '_CHUNK', 10)
  parts = Neighbours(queries, k=5, bank_size=100)
  for start in range(0, 100, step):
    parts.add(bank[start : start + step], labels[start : start + step])
  np.testing.assert_array_equal(parts.predict(num_classes=7, temperature=0.07), expected)
  for ours, theirs in (
    (parts._similarities, whole._similarities),
    (parts._labels, whole._labels),  # of neighbours at the same distance the same ones
  ):
    ours, theirs = (np.asarray(x).reshape(-1, 5)[:23] for x in (ours, theirs))
    np.testing.assert_array_equal(ours, theirs)
  similarities = queries @ bank.T
  nearest = np.argsort(-similarities, axis=1, kind='stable')[:, :5]
  np.testing.assert_array_equal(np.asarray(parts._labels).reshape(-1, 5)[:23], labels[nearest])


def test_no_array_of_the_whole_bank_is_on_the_device(monkeypatch):
  monkeypatch.setattr(voting, '_PART', 64)
  rng = np.random.default_rng(0)
  neighbours = Neighbours(rng.standard_normal((8, 32), np.float32), k=5, bank_size=10_000)
  before = {id(array) for array in jax.live_arrays()}
  sizes = []
  for _ in range(100):
    neighbours.add(rng.standard_normal((100, 32), np.float32), rng.integers(10, size=100))
    sizes += [array.nbytes for array in jax.live_arrays() if id(array) not in before]
  neighbours.predict(num_classes=10, temperature=0.07)
  assert 0 < max(sizes) <= 64 * 32 * 4
  sizes = [v.nbytes for v in vars(neighbours).values() if isinstance(v, np.ndarray)]
  assert sum(sizes) <= 64 * (32 + 1) * 4


@pytest.mark.parametrize('where', ['queries', 'bank'])
def test_nan_features_are_never_right(where):
  features = {
    key: np.random.default_rng(i).standard_normal((6, 4), np.float32)
    for i, key in enumerate(('bank', 'queries'))
  }
  features[where][2] = np.nan
  predicted = knn_predict(features['bank'], np.arange(6) % 2, features['queries'], num_classes=2)
  wrong = predicted == -1
  assert wrong.tolist() == [where == 'bank' or i == 2 for i in range(6)]


def test_pixels_are_counted_for_their_unit():
  labels = np.full((2, 4, 6), 255, np.uint8)
  labels[0, :2, :3], labels[0, 1, 2], labels[0, 3, 5], labels[1, 0, 0] = 1, 2, 0, 3
  counts = np.asarray(knn.pixels_of_units(labels, (2, 2), 3))
  assert counts.tolist() == [[[0, 5, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]], [[0, 0, 0]] * 4]


class _Colours(nnx.Module):
  """Its features of a unit are the mean of its pixels."""

  def __call__(self, images):
    b, h, w, c = images.shape
    return images.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4), dtype=np.float32)


def _scene(classes, ignored=()):
  """An image of 2x2 units of 2x2 pixels, each of the colour of its class, and its label map."""
  labels = np.array(classes, np.uint8).reshape(2, 2).repeat(2, axis=0).repeat(2, axis=1)
  image = 200 * np.eye(3, dtype=np.uint8)[labels]
  for place in ignored:
    labels[place] = 255
  return {'image': image, 'segmentation': labels}


def _segmented(scenes, *, truth=None):
  """The evaluator's metrics of the last scene, with the others as training scenes."""
  bank, queries = _Scenes(scenes[:-1]), _Scenes(scenes[-1:])
  if truth is not None:
    queries[0]['segmentation'] = truth
  context = types.SimpleNamespace(
    graphdef=nnx.split(_Colours())[0],
    train_source=bank,
    sets={'eval': queries},
    task=types.SimpleNamespace(transforms=lambda train, **options: None),
    every=lambda section: 1,
    setting={
      'knn.k': 1, 'knn.temperature': 0.07, 'knn.bank_size': 0,
      'segment.ignore_index': 255, 'segment.reduce_zero_label': False,
    }.__getitem__,
    some=lambda source, size: source,
    batches=lambda source, transform: contextlib.nullcontext([source.batch()]),
    whole=lambda params: params,
    fetch=np.asarray,
  )  # fmt: skip
  (evaluator,) = knn.evaluators(context, None, lambda model, images: model(images))
  return evaluator.run(0, {'params': {}})


class _Scenes(list):
  name, split, class_names, num_classes = 'scenes', 'test', ('a', 'b', 'c'), 3

  def batch(self):
    rows = {key: np.stack([scene[key] for scene in self]) for key in self[0]}
    return rows | {'mask': np.ones(len(self), bool), 'index': np.arange(len(self))}


def test_units_have_the_class_of_their_neighbours():
  bank = [_scene([0, 1, 2, 0]), _scene([1, 1, 2, 2])]
  assert _segmented([*bank, _scene([2, 0, 1, 1])]) == {'eval/knn_miou': 1.0}
  # A pixel of another class than most of its unit's is wrong: 3 of 4 and 4 of 5, and all of b.
  truth = _scene([2, 0, 1, 1])['segmentation']
  truth[0, 0] = 0
  found = _segmented([*bank, _scene([2, 0, 1, 1])], truth=truth)
  assert found == {'eval/knn_miou': pytest.approx((4 / 5 + 1 + 3 / 4) / 3)}


def test_pixels_that_do_not_count_and_units_without_any():
  every = [(i, j) for i in range(2) for j in range(2)]
  bank = [_scene([0, 1, 2, 2], every), _scene([1, 1, 2, 2])]  # no unit votes for a
  scene = _scene([0, 1, 1, 2], [(3, 3), *every])
  assert _segmented([*bank, scene]) == {'eval/knn_miou': 1.0}


def test_units_without_a_prediction_are_wrong(monkeypatch):
  predict = knn.Neighbours.predict
  monkeypatch.setattr(
    knn.Neighbours, 'predict', lambda self, **options: np.array([-1, *predict(self, **options)[1:]])
  )
  bank = [_scene([0, 1, 2, 0]), _scene([1, 1, 2, 2])]
  found = _segmented([*bank, _scene([2, 2, 0, 1])])
  assert found == {'eval/knn_miou': pytest.approx((1 / 2 + 1 + 1) / 3)}


def test_label_maps_of_other_classes():
  scenes = [_scene([0, 1, 2, 2]), _scene([1, 1, 2, 2])]
  context = types.SimpleNamespace(
    every=lambda section: 1,
    train_source=_Scenes(scenes),
    sets={'eval': _Scenes([scenes[0] | {'label': 0}])},
  )
  with pytest.raises(UserError, match='has no label maps of the classes of scenes'):
    knn.evaluators(context, None, None)
