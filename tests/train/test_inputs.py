"""Whether a data set has the classes of a model, and what becomes of its labels."""

import pickle

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data.builders import imagenet_files
from hivit_jax.data.sources.folder import FolderSource
from hivit_jax.errors import UserError
from hivit_jax.train import inputs


def _folder(root, classes, each=2) -> FolderSource:
  for name in classes:
    (root / 'val' / name).mkdir(parents=True)
    for i in range(each):
      Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / 'val' / name / f'{i}.png')
  return FolderSource(str(root), 'val')


def _labels(source) -> dict[str, int]:
  """Folder of an image -> its label."""
  return {source.example_name(i).split('/')[-2]: source[i]['label'] for i in range(len(source))}


@pytest.mark.parametrize('names', [None, imagenet_files.synsets()])
def test_a_part_of_imagenet_by_synsets_gets_the_official_labels(tmp_path, caplog, names):
  """The order of the labels of every published ImageNet classifier is that of the synsets."""
  with caplog.at_level('INFO'):
    source = inputs.with_classes_of(
      names, 1000, 'FILE', _folder(tmp_path, ['n02123045', 'n01440764', 'n15075141'])
    )
  # Tench, tabby and toilet tissue: the first, the 282nd and the last class.
  assert _labels(source) == {'n01440764': 0, 'n02123045': 281, 'n15075141': 999}
  assert _labels(pickle.loads(pickle.dumps(source))) == _labels(source)
  assert (source.num_classes, len(source)) == (1000, 6)
  (record,) = caplog.records
  assert 'the 3 classes of folder:' in record.getMessage()
  assert (
    'were found by name among the 1000 of FILE; predictions are over all 1000'
    in record.getMessage()
  )


def test_all_of_imagenet_stays_as_it_is_without_a_word(tmp_path, caplog):
  source = _folder(tmp_path, imagenet_files.synsets(), each=1)
  assert inputs.with_classes_of(None, 1000, 'FILE', source) is source
  assert not caplog.records


def test_named_classes_are_found_in_any_order_and_a_part_of_them_suffices(tmp_path):
  source = inputs.with_classes_of(
    ['dog', 'cat', 'ant'], 3, 'FILE', _folder(tmp_path, ['cat', 'dog'])
  )
  assert _labels(source) == {'dog': 0, 'cat': 1}
  assert source.class_names == ('dog', 'cat', 'ant')


def test_unknown_labels_stay_unknown():
  class Unlabelled:
    name, split, class_names, num_classes = 'x', 'test', ('a', 'b'), 2

    def __getitem__(self, index):
      return {'image': b'', 'label': -1}

  assert inputs.with_classes_of(['b', 'a'], 2, 'FILE', Unlabelled())[0]['label'] == -1


def test_as_many_classes_without_names_are_warned_of(tmp_path, caplog):
  source = _folder(tmp_path, ['ant', 'bee'])
  assert inputs.with_classes_of(None, 2, 'FILE', source) is source
  (record,) = caplog.records
  assert record.levelname == 'WARNING'
  assert record.getMessage().startswith('FILE has no class names: assuming its 2 classes are the 2')


@pytest.mark.parametrize(
  ('names', 'count', 'message'),
  [
    (None, 1000, r'FILE has 1000 classes without names, and folder:.* has 2: .*data\.name.*'),
    (None, 3, 'FILE has 3 classes without names, and .* has 2: they cannot be matched'),
    (
      ['ant', 'cat'], 2,
      r'has other classes \(2\) than FILE \(2\); what differs: bee, cat; .*--config\.data\.name',
    ),
    ([str(i) for i in range(1000)], 1000, r'classes \(2\) than FILE \(1000\).*, and 996 more'),
  ],
)  # fmt: skip
def test_other_classes_are_refused_with_both_counts(tmp_path, names, count, message):
  source = _folder(tmp_path, ['ant', 'bee'])
  with pytest.raises(UserError, match=message):
    inputs.with_classes_of(names, count, 'FILE', source)
  with pytest.raises(UserError) as further:
    inputs.with_classes_of(names, count, 'FILE', source, 'eval_v2')
  assert '--config.evaluation.more' in str(further.value)
  assert '--config.data' not in str(further.value)
