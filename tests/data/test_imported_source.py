"""`data.name=package.module:Name`: a source that this package knows nothing of."""

import sys
import textwrap

import numpy as np
import pytest

from hivit_jax.data import transforms
from hivit_jax.data.loader import eval_loader
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError

MODULE = """
  import numpy as np

  class Stripes:
    class_names, num_classes = ('a', 'b'), 2

    def __init__(self, split, data_dir):
      self.name, self.split, self.data_dir = 'stripes', split, data_dir

    def __len__(self):
      return 6

    def __getitem__(self, index):
      pixels = np.full((8, 9, 3), 40 * index, np.uint8)
      return {'image': pixels, 'label': index % 2, 'segmentation': pixels[..., 0] // 40}

    def example_name(self, index):
      return f'stripe {index}'

  class Unfinished:
    name = split = ''
    def __init__(self, **options):
      pass

  def make(root):
    raise AssertionError('is not called')
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
  folder = tmp_path / 'their' / 'data'
  folder.mkdir(parents=True)
  (folder / 'stripes.py').write_text(textwrap.dedent(MODULE))
  (folder / 'faulty.py').write_text('import json\n\njson.nothing\n')
  (folder / 'unreadable.py').write_text('def (\n')
  (folder / 'needy.py').write_text('import a_package_that_nobody_has\n')
  monkeypatch.syspath_prepend(tmp_path)
  yield
  for name in [name for name in sys.modules if name.split('.')[0] == 'their']:
    del sys.modules[name]


def test_a_class_elsewhere_is_a_data_set(package):
  source = open_source('their.data.stripes:Stripes', 'train[:2]', '/data')
  assert (source.split, source.data_dir, len(source)) == ('train[:2]', '/data', 6)
  transform = transforms.eval_transform(8, keys=('image', 'segmentation', 'label'))
  with eval_loader(source, transform, batch_size=6) as loader:
    batch = next(loader)
  assert batch['label'].tolist() == [0, 1] * 3
  np.testing.assert_array_equal(batch['segmentation'][:, 4, 4], range(6))
  np.testing.assert_array_equal(batch['image'][:, 4, 4, 0], range(0, 240, 40))


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('their.data.stripes:Stripe', r'stripes\.py has no Stripe; did you mean .*stripes:Stripes\?'),
    ('their.data.strips:Stripes', r'there is no module their\.data\.strips; .* in PYTHONPATH'),
    ('nobodys.data:Stripes', 'there is no module nobodys; is the folder that has it in PYTHONPATH'),
    ('their.data.faulty:X', r'importing their\.data\.faulty fails with AttributeError: .*, line 3'),
    ('their.data.unreadable:X', r'importing .* fails with SyntaxError: .*unreadable\.py, line 1'),
    (
      'their.data.needy:X',
      "fails with ModuleNotFoundError: No module named 'a_package",
    ),
    ('their.data.stripes:make', 'has to take the arguments split and data_dir: '),
    (
      'their.data.stripes:Unfinished',
      'no source of examples: it has no class_names, ',
    ),
    ('their.data.stripes:MODULE:x', 'is not the name of a data set'),
    ('digits:3.0.0', 'the embedded set is digits:1'),  # TFDS's versions are no names
  ],
)
def test_mistakes_are_one_line_that_names_the_setting(package, tmp_path, name, message):
  with pytest.raises(UserError, match=message) as error:
    open_source(name, 'train', str(tmp_path))
  assert name in str(error.value)
  assert '\n' not in str(error.value)


def test_a_folder_with_the_name_of_a_class_is_a_folder():
  with pytest.raises(UserError, match='is not a folder'):
    open_source('folder:Stripes', 'train')
