"""Sources: folders, data sets on disk, and what is said when they are not there."""

import contextlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from hivit_jax.data.decode import decode_label_map
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from tests import patience
from tests.data.imagenet_tars import write_tars
from tests.data.noise import png

BY_TFDS = Path(__file__).parent / 'imagenet2012_by_tfds.zip'


def image_bytes(shade: int) -> bytes:
  buffer = io.BytesIO()
  Image.new('RGB', (8, 8), (shade, 255 - shade, 7)).save(buffer, 'PNG')
  return buffer.getvalue()


def write_tree(root: Path, files: dict[str, int]) -> dict[str, bytes]:
  contents = {}
  for name, shade in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    contents[str(path)] = image_bytes(shade)
    path.write_bytes(contents[str(path)])
  return contents


def listing(source) -> dict[str, tuple[int, bytes]]:
  return {
    source.example_name(i): (source[i]['label'], source[i]['image']) for i in range(len(source))
  }


@pytest.fixture
def tree(tmp_path):
  """Ten images of each of three classes, and a validation split that lacks one class."""
  files = {f'train/{c}/{i}.jpg': 10 * i for c in ('cat', 'ant', 'bee') for i in range(10)}
  files |= {f'val/{c}/{i}.jpg': 200 + i for c in ('bee', 'cat') for i in range(3)}
  write_tree(tmp_path, files)
  return tmp_path


def test_folder_labels_are_the_sorted_classes_and_images_are_the_bytes_of_the_files(tmp_path):
  contents = write_tree(
    tmp_path,
    {
      'train/b/1.JPG': 1,
      'train/b/deeper/and/deeper/2.jpeg': 2,
      'train/a/x.Png': 3,
      'train/a/y.webp': 4,
      'train/c/z.bmp': 5,
    },
  )
  for noise in ('a/.hidden.jpg', 'a/notes.txt', '.git/x.jpg', 'loose.jpg'):
    write_tree(tmp_path / 'train', {noise: 0})
  source = open_source(f'folder:{tmp_path}', 'train')
  assert source.class_names == ('a', 'b', 'c')
  assert source.num_classes == 3
  found = listing(source)
  assert {name: image for name, (_, image) in found.items()} == contents
  for name, (label, _) in found.items():
    assert 'abc'[label] == Path(name).relative_to(tmp_path / 'train').parts[0]


def test_folder_follows_links_to_classes_and_files(tree):
  (tree / 'linked').mkdir()
  (tree / 'linked' / 'cat').symlink_to(tree / 'train' / 'cat')
  (tree / 'linked' / 'bee').mkdir()
  (tree / 'linked' / 'bee' / 'one.jpg').symlink_to(tree / 'train' / 'bee' / '1.jpg')
  (tree / 'linked' / 'bee' / 'upwards').symlink_to(tree / 'linked')  # must not be followed forever
  assert len(open_source(f'folder:{tree}', 'linked')) == 11


def test_folder_labels_agree_between_splits_when_one_lacks_a_class(tree):
  train, val = (open_source(f'folder:{tree}', split) for split in ('train', 'val'))
  assert train.class_names == val.class_names == ('ant', 'bee', 'cat')
  assert {label for label, _ in listing(val).values()} == {1, 2}


def test_folder_order_is_shuffled_and_always_the_same(tree):
  first, again = (open_source(f'folder:{tree}', 'train') for _ in range(2))
  names = [first.example_name(i) for i in range(30)]
  assert names == [again.example_name(i) for i in range(30)]
  assert names != sorted(names)
  (tree / 'train' / 'ant' / 'new.jpg').write_bytes(image_bytes(9))
  grown = open_source(f'folder:{tree}', 'train')
  assert [n for n in map(grown.example_name, range(31)) if 'new' not in n] == names


def test_folder_slices_are_parts_of_the_whole(tree):
  whole = open_source(f'folder:{tree}', 'train')
  names = [whole.example_name(i) for i in range(30)]

  def part(split):
    source = open_source(f'folder:{tree}', split)
    assert source.split == split
    return [source.example_name(i) for i in range(len(source))]

  assert part('train[:90%]') == names[:27]
  assert part('train[90%:]') == names[27:]
  assert part('train[5:-5]') == names[5:25]
  assert part('train[:2]+train[28:]') == names[:2] + names[28:]
  assert part('all')[:30] == names
  assert len(part('all')) == 36
  labels = [whole[i]['label'] for i in range(15)]
  assert set(labels) == {0, 1, 2}  # half of the split has all classes: it is not sorted by class


def test_folder_source_is_small_to_pickle_and_reads_the_same_afterwards(tree):
  source = open_source(f'folder:{tree}', 'train')
  copy = pickle.loads(pickle.dumps(source))
  assert listing(copy) == listing(source)
  with pytest.raises(IndexError, match='30 examples'):
    source[30]


@pytest.mark.parametrize(
  ('files', 'split', 'message'),
  [
    ({}, 'train', 'holds no split folders; expected <root>/<split>/<class>'),
    ({'cat/1.jpg': 1}, 'train', "has no split 'train'; it has: cat; the layout is <root>/<split>"),
    ({'1.jpg': 1, '2.jpg': 1}, 'train', 'no split folders but 2 images, such as 1.jpg; expected'),
    ({'train/1.txt': 1}, 'train', 'train holds neither class folders nor images; expected <root>'),
    ({'train/a/1.jpg': 1, 'train/b/1.txt': 1}, 'train', r'no images in 1 class folder \(b\)'),
    ({'train/a/1.jpg': 1}, 'validation', "has no split 'validation'; it has: train"),
    (
      {'train/a/1.jpg': 1, 'val/b/1.jpg': 1},
      'val',
      r'1 class folder \(b\) that train does not have',
    ),
    ({'train/a/1.jpg': 1}, 'train[:5', 'cannot read the split'),
    ({'train/a/1.jpg': 1}, 'train[:5]', 'incompatible with 1 examples'),
    ({'train/a/1.jpg': 1}, 'train[1:]', 'selects no examples'),
  ],
)
def test_folder_mistakes_say_what_was_found_and_what_is_expected(tmp_path, files, split, message):
  write_tree(tmp_path, files)
  with pytest.raises(UserError, match=message) as error:
    open_source(f'folder:{tmp_path}', split)
  assert '\n' not in str(error.value)


def test_images_beside_class_folders_are_left_out_with_one_warning(tree, caplog):
  write_tree(tree, {'train/b.jpg': 1, 'train/a.png': 2, 'train/.hidden.jpg': 3})
  parts = [open_source(f'folder:{tree}', split) for split in ('train[:50%]', 'train[50%:]')]
  assert sum(map(len, parts)) == 30
  (record,) = caplog.records
  assert record.levelname == 'WARNING'
  assert record.getMessage() == (
    f'{tree}/train: 2 images beside the class folders are left out, because they have no class, '
    'such as a.png'
  )


def test_images_without_class_folders_have_no_labels(tmp_path):
  contents = write_tree(tmp_path, {f'train/{i}.jpg': i for i in range(20)})
  write_tree(tmp_path, {'val/cat/1.jpg': 1, 'val/ant/2.jpg': 2})
  source = open_source(f'folder:{tmp_path}', 'train')
  assert listing(source) == {name: (-1, image) for name, image in contents.items()}
  names = [source.example_name(i) for i in range(20)]
  assert names != sorted(names)
  assert source.num_classes == 0
  assert len(open_source(f'folder:{tmp_path}', 'train[:90%]')) == 18
  assert open_source(f'folder:{tmp_path}', 'val').class_names == ('ant', 'cat')


def test_a_split_without_class_folders_beside_one_with_them_has_no_labels(tree):
  write_tree(tree, {'test/1.jpg': 1, 'test/2.jpg': 2})
  source = open_source(f'folder:{tree}', 'test')
  assert source.class_names == ('ant', 'bee', 'cat')
  assert {label for label, _ in listing(source).values()} == {-1}


@contextlib.contextmanager
def without_privileges():
  """As a user whom permissions bind."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


@pytest.mark.parametrize('closed', ['train/bee', 'train', '.'])
def test_a_folder_without_permission_is_named_with_the_command_that_mends_it(closed):
  with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to other users
    write_tree(Path(root), {'train/ant/1.jpg': 1, 'train/bee/1.jpg': 1})
    os.chmod(root, 0o755)
    os.chmod(os.path.join(root, closed), 0)
    with without_privileges(), pytest.raises(UserError) as error:
      open_source(f'folder:{root}', 'train')
    os.chmod(os.path.join(root, closed), 0o755)
  assert str(error.value) == (
    f'cannot read {os.path.normpath(os.path.join(root, closed))}: Permission denied; make it '
    f'readable (chmod -R u+rX {root}), or move it away'
  )


def test_folder_that_does_not_exist():
  with pytest.raises(UserError, match='/no/such is not a folder'):
    open_source('folder:/no/such', 'train')


@pytest.fixture
def prepared_by_tfds(tmp_path):
  """ImageNet as TFDS 4.9.10 with TensorFlow 2.21 wrote it, from tars as `write_tars` makes them."""
  with zipfile.ZipFile(BY_TFDS) as archive:
    archive.extractall(tmp_path)
  return tmp_path


@pytest.mark.parametrize('name', ['imagenet2012', 'imagenet2012:5.1.0', 'imagenet2012:5.*.*'])
def test_imagenet_prepared_by_tfds_itself_is_read_as_is(prepared_by_tfds, tmp_path_factory, name):
  tars = write_tars(tmp_path_factory.mktemp('tars'), classes=3, per_class=2, validation=3)
  for split, expected in (('train', tars.train), ('validation', tars.validation)):
    source = open_source(name, split, str(prepared_by_tfds))
    assert source.num_classes == 1000
    assert source.class_names[:2] == ('n01440764', 'n01443537')
    found = {n.split('(')[1].rstrip(')'): value for n, value in listing(source).items()}
    assert {n: label for n, (label, _) in found.items()} == {
      n: label for n, (label, _) in expected.items()
    }
    for _, image in found.values():
      assert Image.open(io.BytesIO(image)).size[0] == 40
  assert source.example_name(0).startswith(f'{name}/validation[0] (ILSVRC2012_val_')


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set whose keys are not called image and label, written by TFDS's own writer."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = tfds.features.FeaturesDict(
    {
      'picture': tfds.features.Image(),
      'mask': tfds.features.Image(),
      'kind': tfds.features.ClassLabel(names=['x', 'y']),
      'origin': tfds.features.ClassLabel(num_classes=7),
    }
  )
  KEYS = ('picture', 'kind')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=self.FEATURES, supervised_keys=self.KEYS, description='Pictures.'
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(range(20)), 'test': self._generate_examples([20])}

  def _generate_examples(self, numbers):
    for i in numbers:
      example = {'mask': image_bytes(0), 'picture': image_bytes(i), 'kind': i % 2, 'origin': 3}
      yield i, {key: example[key] for key in self.FEATURES}


class WithoutLabel(Pictures, skip_registration=True):
  """No class at all."""

  FEATURES = tfds.features.FeaturesDict({'picture': tfds.features.Image()})
  KEYS = None


class Scenes(Pictures, skip_registration=True):
  """Label maps, and no class."""

  FEATURES = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(),
      'segmentation_mask': tfds.features.Image(shape=(None, None, 1), use_colormap=True),
    }
  )
  KEYS = None

  def _generate_examples(self, numbers):
    for i in numbers:
      labels = png(np.full((8, 8), i, np.uint8))
      yield i, {'image': image_bytes(i), 'segmentation_mask': labels}


class LabelledScenes(Scenes, skip_registration=True):
  """Label maps with names, and a class."""

  FEATURES = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(),
      'segmentation_mask': tfds.features.Image(shape=(None, None, 1)),
      'label': tfds.features.ClassLabel(names=['x', 'y']),
    }
  )

  def _generate_examples(self, numbers):
    for i, example in super()._generate_examples(numbers):
      yield i, {**example, 'label': i % 2}


class TextIds(Pictures, skip_registration=True):
  """Features that have names of ours, and are of other kinds."""

  FEATURES = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(),
      'label': tfds.features.ClassLabel(names=['x', 'y']),
      'image_id': tfds.features.Text(),
      'size': tfds.features.Scalar(np.int64),
    }
  )
  KEYS = None

  def _generate_examples(self, numbers):
    for i in numbers:
      yield i, {'image': image_bytes(i), 'label': 0, 'image_id': 'a', 'size': 3}


class Fields(Pictures, skip_registration=True):
  """Arrays instead of encoded images, in every form that TFDS stores them in."""

  FEATURES = tfds.features.FeaturesDict(
    {
      'bands': tfds.features.Tensor(shape=(6, 5, 13), dtype=np.uint16),
      'label': tfds.features.ClassLabel(names=['x', 'y']),
    }
  )
  KEYS = ('bands', 'label')

  def _generate_examples(self, numbers):
    feature = self.FEATURES['bands']
    for i in numbers:
      array = np.arange(390).reshape(6, 5, 13) * 168 + i
      yield i, {'bands': array.astype(feature.np_dtype), 'label': i % 2}


class SomeRows(Fields, skip_registration=True):
  FEATURES = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Tensor(shape=(None, 5, 13), dtype=np.float32),
      'label': tfds.features.ClassLabel(names=['x', 'y']),
    }
  )
  KEYS = None

  def _generate_examples(self, numbers):
    for i in numbers:
      rows = np.arange(390).reshape(6, 5, 13)[: 1 + i % 6] / 7 + i
      yield i, {'image': rows.astype(np.float32), 'label': i % 2}


class AnySize(SomeRows, skip_registration=True):
  FEATURES = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Tensor(shape=(None, None, 13), dtype=np.float32, encoding='zlib'),
      'label': tfds.features.ClassLabel(names=['x', 'y']),
    }
  )


def prepare_with_tfds(builder_class, folder, **options) -> Path:
  builder = builder_class(data_dir=folder, file_format='array_record', **options)
  builder.download_and_prepare()
  return Path(builder.data_dir)


def test_keys_come_from_the_supervised_keys_of_the_set(tmp_path):
  prepare_with_tfds(Pictures, tmp_path)
  source = open_source('pictures', 'train', str(tmp_path))
  assert source.class_names == ('x', 'y')
  expected = {image_bytes(i): i % 2 for i in range(20)}
  assert {image: label for label, image in listing(source).values()} == expected
  slices = [open_source('pictures', f'train[{s}]', str(tmp_path)) for s in (':25%', '25%:')]
  assert [len(s) for s in slices] == [5, 15]
  assert [s[i] for s in slices for i in range(len(s))] == [source[i] for i in range(20)]
  assert len(open_source('pictures', 'train+test', str(tmp_path))) == 21


def test_ids_and_sizes_of_other_kinds_are_left_out(tmp_path):
  prepare_with_tfds(TextIds, tmp_path)
  assert open_source('text_ids', 'train', str(tmp_path))[0].keys() == {'image', 'label'}


@pytest.mark.parametrize('builder', [Fields, SomeRows, AnySize])
def test_arrays_come_as_they_were_stored(tmp_path, builder):
  prepare_with_tfds(builder, tmp_path)
  source = pickle.loads(pickle.dumps(open_source(builder.name, 'train', str(tmp_path))))
  expected = {
    next(iter(e.values())).tobytes(): e for _, e in builder._generate_examples(builder, range(20))
  }
  for i in range(20):
    example = source[i]
    image, label = expected.pop(example['image'].tobytes()).values()
    assert example['label'] == label
    assert example['image'].dtype == image.dtype
    np.testing.assert_array_equal(example['image'], image)


@pytest.mark.parametrize('builder', [Scenes, LabelledScenes])
def test_label_maps_are_passed_on_as_files(tmp_path, builder):
  prepare_with_tfds(builder, tmp_path)
  source = open_source(builder.name, 'train', str(tmp_path))
  labelled = builder is LabelledScenes
  assert source.class_names == (('x', 'y') if labelled else ())
  for i in range(20):
    example = source[i]
    assert example.keys() == {'image', 'segmentation', *(['label'] if labelled else [])}
    shade = Image.open(io.BytesIO(example['image'])).getpixel((0, 0))[0]
    labels = np.asarray(decode_label_map(example['segmentation']))
    np.testing.assert_array_equal(labels, np.full((8, 8), shade))
    assert example.get('label', shade % 2) == shade % 2


def test_a_set_without_image_and_class_says_which_features_it_has(tmp_path):
  prepare_with_tfds(WithoutLabel, tmp_path)
  with pytest.raises(UserError, match=r'not an image classification .* has picture \(Image\)'):
    open_source('without_label', 'train', str(tmp_path))


def test_the_highest_version_is_read_unless_one_is_named(tmp_path):
  folder = prepare_with_tfds(Pictures, tmp_path)
  newer = folder.with_name('1.2.0')
  newer.mkdir()
  for file in folder.iterdir():
    text = file.read_bytes()
    if file.name == 'dataset_info.json':
      text = text.replace(b'1.0.0', b'1.2.0')
    if file.name == 'kind.labels.txt':
      text = b'new\nnewer\n'
    (newer / file.name).write_bytes(text)
  assert open_source('pictures', 'train', str(tmp_path)).class_names == ('new', 'newer')
  assert open_source('pictures:1.0.0', 'train', str(tmp_path)).class_names == ('x', 'y')


def test_configs_must_be_named_when_there_are_several(tmp_path):
  folder = prepare_with_tfds(Pictures, tmp_path)
  for config in ('big', 'small'):
    target = tmp_path / 'pictures' / config / '1.0.0'
    target.mkdir(parents=True)
    for file in folder.iterdir():
      (target / file.name).write_bytes(file.read_bytes())
  for file in folder.iterdir():
    file.unlink()
  folder.rmdir()
  with pytest.raises(UserError, match='name one: pictures/big, pictures/small'):
    open_source('pictures', 'train', str(tmp_path))
  assert len(open_source('pictures/big', 'train', str(tmp_path))) == 20


@pytest.mark.parametrize('name', ['imagenet2012', 'cifar10'])
def test_a_set_stored_as_tfrecord_is_recognised_and_the_way_out_is_named(prepared_by_tfds, name):
  info = prepared_by_tfds / 'imagenet2012/5.1.0/dataset_info.json'
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  if name != 'imagenet2012':
    (prepared_by_tfds / 'imagenet2012').rename(prepared_by_tfds / name)
  way_out = {
    'imagenet2012': r'python -m hivit_jax.tools.prepare imagenet2012 --train_tar=',
    'cifar10': r"tfds.builder\('cifar10', data_dir='/path/to/other/folder'\).download_and_prepare",
  }[name]
  with pytest.raises(UserError, match=rf'5.1.0 is stored as tfrecord.*{way_out}'):
    open_source(name, 'train', str(prepared_by_tfds))


def test_a_set_that_is_not_there_names_the_folders_and_the_commands(tmp_path):
  with pytest.raises(UserError) as error:
    open_source('cifar10', 'train', str(tmp_path))
  message = str(error.value)
  assert str(tmp_path / 'cifar10') in message
  assert f"tfds.builder('cifar10', data_dir='{tmp_path}')" in message
  assert "file_format='array_record'" in message
  assert '\n' not in message
  with pytest.raises(UserError, match=r"unknown data set 'cifer10'.*mean cifar10"):
    open_source('cifer10', 'train', str(tmp_path))
  with pytest.raises(UserError, match='is not the name of a data set'):
    open_source('my images', 'train', str(tmp_path))


@pytest.mark.parametrize('name', ['imagenet', 'imagenet1k', 'ILSVRC2012'])
def test_the_other_names_of_imagenet(tmp_path, name):
  with pytest.raises(UserError, match=f"unknown data set '{name}'.* Did you mean imagenet2012"):
    open_source(name, 'train', str(tmp_path))


def test_an_unknown_split_lists_those_there_are(prepared_by_tfds):
  with pytest.raises(UserError, match="no split 'test'; it has: train, validation"):
    open_source('imagenet2012', 'test', str(prepared_by_tfds))


def test_a_missing_file_is_named_when_the_set_is_opened(prepared_by_tfds):
  shard = next(prepared_by_tfds.glob('imagenet2012/5.1.0/*train*'))
  shard.unlink()
  with pytest.raises(UserError, match=f"1 of 1 files of split 'train' are missing.*{shard.name}"):
    open_source('imagenet2012', 'train', str(prepared_by_tfds))
  assert len(open_source('imagenet2012', 'validation', str(prepared_by_tfds))) == 3


def test_threads_and_pickled_copies_read_the_same_as_one_thread(tmp_path):
  prepare_with_tfds(Pictures, tmp_path)
  source = open_source('pictures', 'train', str(tmp_path))
  expected = [source[i] for i in range(20)]
  fresh = open_source('pictures', 'train', str(tmp_path))
  with ThreadPoolExecutor(8) as threads:
    assert list(threads.map(fresh.__getitem__, list(range(20)) * 10)) == expected * 10
  copy = pickle.loads(pickle.dumps(source))
  assert [copy[np.int64(i)] for i in range(20)] == expected
  with pytest.raises(IndexError, match='20 examples'):
    source[20]
  with pytest.raises(IndexError, match='20 examples'):
    source[-1]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-W', 'error', '-c', code, *arguments],
    capture_output=True,
    text=True,
    timeout=patience.limit(60),
    cwd=Path(__file__).parents[2],
    env={k: v for k, v in os.environ.items() if not k.startswith('TFDS')},
  )


def test_opening_is_quiet_and_imports_neither_tensorflow_nor_jax(prepared_by_tfds):
  code = """
import sys
from hivit_jax.data.sources.base import open_source
source = open_source('imagenet2012', 'train[:50%]', sys.argv[1])
heavy = {'tensorflow', 'jax', 'grain', 'sklearn', 'skimage'} & set(sys.modules)
print(len(source), source[0]['label'] >= 0, heavy or 'none')
"""
  done = run_python(code, str(prepared_by_tfds))
  assert (done.stdout, done.stderr) == ('3 True none\n', '')


def test_more_shards_than_files_may_be_open_are_read(tmp_path):
  code = """
import resource, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
from hivit_jax.data.builders.digits import Digits
from hivit_jax.data.sources.base import open_source
Digits(data_dir=sys.argv[1], examples_per_shard=10).download_and_prepare()
source = open_source('digits', 'train', sys.argv[1])
print(len(source), len({source[i]['image'] for i in range(len(source))}) > 1000)
"""
  done = run_python(code, str(tmp_path))
  assert (done.stdout, done.stderr) == ('1442 True\n', '')
