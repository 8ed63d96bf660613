"""Builders: what the embedded sets hold, and how preparation survives what happens to it."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from hivit_jax.data.builders import imagenet_files, photo_tiles
from hivit_jax.data.builders.digits import Digits
from hivit_jax.data.builders.imagenet import ImageNet2012
from hivit_jax.data.builders.packages import package_file
from hivit_jax.data.builders.photo_scenes import PhotoScenes
from hivit_jax.data.builders.photo_tiles import PhotoTiles
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from tests import patience
from tests.data.imagenet_tars import write_tars

ROOT = Path(__file__).parents[2]


def file_bytes(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def pixels(example: dict) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(example['image'])))


@pytest.fixture(scope='module')
def embedded(data_dir):
  return str(data_dir)


@pytest.mark.parametrize(('split', 'count'), [('train', 320), ('test', 64)])
def test_photo_tiles_are_balanced_rgb_tiles_with_structure(embedded, split, count):
  source = open_source('photo_tiles', split, embedded)
  examples = [source[i] for i in range(len(source))]
  assert source.num_classes == 16
  assert np.bincount([e['label'] for e in examples]).tolist() == [count] * 16
  assert len({e['image'] for e in examples}) > 0.99 * len(examples)
  some = [pixels(e) for e in examples[::7]]
  assert {(p.shape, p.dtype) for p in some} == {((96, 96, 3), np.dtype('uint8'))}
  assert np.median([p.std() for p in some]) > 20
  # Shuffled: a hundredth of the split has most of the photographs.
  assert len({e['label'] for e in examples[: len(examples) // 50]}) > 8


@pytest.mark.parametrize('name', ['astronaut', 'coins', 'retina'])  # as it is, narrow, reduced
def test_photo_tiles_of_train_and_test_share_no_pixel(name):
  """Any change to the middle band leaves the train tiles as they are, and the other way round."""
  with Image.open(package_file(*photo_tiles.PHOTOS[name])) as file:
    photo = file.convert('RGB')
  band = max(0.24 * photo.width, 112 / min(1, 512 / max(photo.size)))
  left, right = round((photo.width - band) / 2), round((photo.width + band) / 2)
  noise = np.random.default_rng(0).integers(0, 256, (photo.height, photo.width, 3), np.uint8)
  middle, sides = np.asarray(photo).copy(), np.asarray(photo).copy()
  middle[:, left + 1 : right - 1] = noise[:, left + 1 : right - 1]
  sides[:, : left - 1] = noise[:, : left - 1]
  sides[:, right + 1 :] = noise[:, right + 1 :]

  def cut(image):
    tiles = photo_tiles.cut_tiles(Image.fromarray(image), name)
    return {split: np.stack([tile.pixels for tile in listed]) for split, listed in tiles.items()}

  original, without_middle, without_sides = map(cut, (np.asarray(photo), middle, sides))
  assert np.array_equal(original['train'], without_middle['train'])
  assert np.array_equal(original['test'], without_sides['test'])
  # and the changes did reach every tile of the other split
  assert (original['test'] != without_middle['test']).any(axis=(1, 2, 3)).all()
  assert (original['train'] != without_sides['train']).any(axis=(1, 2, 3)).all()


def test_photo_tiles_have_unique_names(embedded):
  names = []
  for split in ('train', 'test'):
    source = open_source('photo_tiles', split, embedded)
    names += [source.example_name(i).split('(')[1] for i in range(len(source))]
  assert len(set(names)) == len(names) == 16 * 384


def test_digits_are_those_of_scikit_learn(embedded):
  from sklearn.datasets import load_digits

  bunch = load_digits()
  expected = {
    (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
    for image, label in zip(bunch.images, bunch.target, strict=True)
  }
  seen, sizes = [], {}
  for split in ('train', 'test'):
    source = open_source('digits', split, embedded)
    sizes[split] = len(source)
    labels = [source[i]['label'] for i in range(len(source))]
    assert np.ptp(np.bincount(labels, minlength=10)) <= 8  # as even as the data
    seen += [(pixels(source[i]).tobytes(), source[i]['label']) for i in range(len(source))]
  assert sizes == {'train': 1442, 'test': 355}
  assert set(seen) == expected
  assert len(seen) == len(expected)


@pytest.mark.parametrize('builder', [PhotoTiles, Digits])
def test_the_same_bytes_every_time(embedded, tmp_path, builder):
  again = builder(data_dir=str(tmp_path))
  again.download_and_prepare()
  assert file_bytes(Path(embedded) / again.name / '1.0.0') == file_bytes(again.data_dir)


def test_scenes_are_the_same_every_time(embedded):
  """A scene depends on its number alone: some tell of all."""
  for split, content in PhotoScenes()._contents().items():
    source = open_source('photo_scenes', split, embedded)
    for i in (0, 1, len(source) - 1):
      kept, name = source[i], re.findall(r'\w+\.jpg', source.example_name(i))[0]
      drawn = content.examples[content.names.index(name)]
      for key in ('image', 'segmentation', 'instances'):
        assert drawn[key] == kept[key]


@pytest.mark.parametrize('builder', [PhotoTiles, PhotoScenes, Digits])
def test_tfds_reads_what_we_write(embedded, builder):
  name = builder.name
  records = tfds.builder_from_directory(Path(embedded) / name / '1.0.0').as_data_source(
    'train', decoders={'image': tfds.decode.SkipDecoding()}
  )
  ours = open_source(name, 'train', embedded)
  assert len(records) == len(ours)
  for i in (0, len(ours) - 1):
    assert records[i]['image'] == ours[i]['image']
    assert records[i].get('label') == ours[i].get('label')


def test_processes_that_prepare_at_once_do_not_break_each_other(tmp_path):
  code = (
    'import sys; from hivit_jax.data.sources.base import open_source; '
    's = open_source("digits", "train", sys.argv[1]); print(len(s), s[3]["label"])'
  )
  command = [sys.executable, '-W', 'error', '-c', code, str(tmp_path)]
  racers = [
    subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(4)
  ]
  results = [(*racer.communicate(timeout=patience.limit(60)), racer.returncode) for racer in racers]
  assert results == [results[0]] * 4
  assert results[0][0].startswith('1442 ')
  assert results[0][1:] == ('', 0)
  assert [path.name for path in (tmp_path / 'digits').iterdir() if path.is_dir()] == ['1.0.0']


def stop_before_the_end(builder, monkeypatch) -> Path:
  """Stops a preparation when all shards are there; returns its folder."""

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(builder.info, 'write_to_directory', stop)
    with pytest.raises(KeyboardInterrupt):
      builder.download_and_prepare()
  assert not builder.is_ready()
  return Path(builder.data_dir).with_name('incomplete.1.0.0')


def test_leftovers_of_a_killed_run_do_not_end_up_in_the_data_set(tmp_path, monkeypatch):
  reference = Digits(data_dir=str(tmp_path / 'a'), examples_per_shard=500)
  reference.download_and_prepare()
  builder = Digits(data_dir=str(tmp_path / 'b'), examples_per_shard=500)
  partial = stop_before_the_end(builder, monkeypatch)
  (partial / 'digits-train.array_record-00001-of-00003').unlink()
  (partial / 'digits-train.array_record-00001-of-00003.unfinished').write_bytes(b'half a shard')
  damaged = partial / 'digits-train.array_record-00002-of-00003'
  damaged.write_bytes(damaged.read_bytes()[:70_000])
  Digits(data_dir=str(tmp_path / 'b'), examples_per_shard=500).download_and_prepare()
  assert file_bytes(builder.data_dir) == file_bytes(reference.data_dir)


def test_an_unfinished_preparation_from_other_files_is_not_continued(tmp_path, monkeypatch):
  stop_before_the_end(Digits(data_dir=str(tmp_path), examples_per_shard=500), monkeypatch)
  with pytest.raises(UserError, match=r'unfinished preparation of digits .* rm -r /.*incomplete'):
    Digits(data_dir=str(tmp_path), examples_per_shard=400).download_and_prepare()


def test_a_folder_that_cannot_be_written_or_is_in_the_way_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write digits to .*/file/digits: .*data_dir'):
    open_source('digits', 'train', str(tmp_path / 'file'))
  (tmp_path / 'digits' / '1.0.0').mkdir(parents=True)
  with pytest.raises(UserError, match=r'digits/1.0.0 is in the way'):
    open_source('digits', 'train', str(tmp_path))
  with pytest.raises(UserError, match=r'the embedded set is digits:1\.0\.0, no other'):
    open_source('digits:3.0.0', 'train', str(tmp_path))


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path, monkeypatch):
  from hivit_jax.data.builders import sharded

  usage = sharded.shutil.disk_usage(tmp_path)
  monkeypatch.setattr(sharded.shutil, 'disk_usage', lambda _: usage._replace(free=1000))
  with pytest.raises(UserError, match=r'needs 0.0 GB, and 0.0 GB are free there'):
    Digits(data_dir=str(tmp_path)).download_and_prepare()


def test_a_write_that_fails_ends_with_one_line_and_can_be_mended(tmp_path):
  code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
try:
  open_source("digits", "train", sys.argv[1])
except UserError as error:
  print(error)
"""
  command = [sys.executable, '-W', 'error', '-c', code, str(tmp_path)]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=patience.limit(60)
  )
  assert done.stderr == ''
  assert re.fullmatch(r'cannot write .*digits-train.*: .*File too large; fix.*\n', done.stdout)
  assert len(open_source('digits', 'train', str(tmp_path))) == 1442


def prepared_imagenet(folder, **sources) -> ImageNet2012:
  builder = ImageNet2012(
    data_dir=str(folder), allow_other_counts=True, examples_per_shard=4, **sources
  )
  builder.download_and_prepare()
  return builder


def extract(tars, folder, sorted_validation=True) -> Path:
  synsets = imagenet_files.synsets()
  for name, (label, image) in tars.train.items():
    (folder / 'train' / synsets[label]).mkdir(parents=True, exist_ok=True)
    (folder / 'train' / synsets[label] / name).write_bytes(image)
  for name, (label, image) in tars.validation.items():
    target = folder / 'val' / (synsets[label] if sorted_validation else '')
    target.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes(image)
  return folder


def test_imagenet_from_tars_has_every_image_with_its_label_and_bytes(tmp_path):
  tars = write_tars(tmp_path)
  prepared_imagenet(tmp_path, train_tar=tars.train_tar, val_tar=tars.val_tar)
  for split, expected in (('train', tars.train), ('validation', tars.validation)):
    source = open_source('imagenet2012', split, str(tmp_path))
    assert source.num_classes == 1000
    found = {
      source.example_name(i).split('(')[1].rstrip(')'): (source[i]['label'], source[i]['image'])
      for i in range(len(source))
    }
    assert found == expected


@pytest.mark.parametrize('sorted_validation', [True, False])
def test_imagenet_from_folders_gives_the_same_files_as_from_tars(tmp_path, sorted_validation):
  tars = write_tars(tmp_path)
  from_tars = prepared_imagenet(tmp_path / 'a', train_tar=tars.train_tar, val_tar=tars.val_tar)
  folders = extract(tars, tmp_path / 'extracted', sorted_validation)
  from_folders = prepared_imagenet(tmp_path / 'b', source_dir=folders)
  assert file_bytes(from_tars.data_dir) == file_bytes(from_folders.data_dir)


def test_imagenet_with_one_split_only(tmp_path):
  tars = write_tars(tmp_path)
  builder = prepared_imagenet(tmp_path, val_tar=tars.val_tar)
  assert list(builder.info.splits) == ['validation']
  assert len(open_source('imagenet2012', 'validation', str(tmp_path))) == 5
  with pytest.raises(UserError, match='was prepared before without train; delete that folder'):
    prepared_imagenet(tmp_path, train_tar=tars.train_tar, val_tar=tars.val_tar)


def test_imagenet_is_checked_by_count(tmp_path):
  tars = write_tars(tmp_path)
  builder = ImageNet2012(data_dir=str(tmp_path), train_tar=tars.train_tar)
  with pytest.raises(
    UserError, match='found 12 train images, ImageNet 2012 has 1281167; no image of 997 classes'
  ):
    builder.download_and_prepare()
  assert not builder.is_ready()


@pytest.mark.parametrize(
  ('which', 'listed'), [('train_tar', {0, 4, 8}), ('val_tar', {1, 2, 3, 4, 5})]
)
def test_a_tar_that_was_cut_off_anywhere_is_noticed(tmp_path, which, listed):
  tar = getattr(write_tars(tmp_path), which)
  data = tar.read_bytes().rstrip(b'\0')  # without the end mark and the padding behind it
  found = set()
  for cut in range(1024, len(data), 512 - 12):  # in headers and images of both levels of tars
    tar.write_bytes(data[:cut])
    with pytest.raises(UserError) as error:
      prepared_imagenet(tmp_path, **{which: tar})
    message = re.fullmatch(
      rf'{tar} is damaged or truncated \((?:unexpected end of data|no end mark)\): it ends after '
      r'0\.0\d\d GB and (\d+) images(, the last one \w+\.JPEG)?; download it again',
      str(error.value),
    )
    assert message, error.value
    found.add(int(message[1]))
  assert found == listed


def test_wrong_sources_are_explained(tmp_path):
  tars = write_tars(tmp_path)
  cases = [
    ({}, 'needs --train_tar=ILSVRC2012_img_train.tar and/or'),
    ({'train_tar': tmp_path / 'no.tar'}, 'no.tar does not exist'),
    ({'train_tar': tars.val_tar}, 'holds ILSVRC2012_val_.*one tar per class'),
    ({'val_tar': tars.train_tar}, r'holds n01440764.tar; the validation images are called'),
    ({'train_tar': ROOT / 'README.md', 'source_dir': tmp_path}, 'not both'),
    ({'train_tar': Path(__file__)}, 'cannot be read as a tar file'),
    ({'source_dir': tmp_path}, 'holds neither train/'),
  ]
  for sources, message in cases:
    with pytest.raises(UserError, match=message):
      prepared_imagenet(tmp_path, **sources)
  folders = extract(tars, tmp_path / 'extracted')
  misplaced = folders / 'val' / 'n01440764'
  misplaced.mkdir()
  (folders / 'val' / 'n01751748' / 'ILSVRC2012_val_00000001.JPEG').rename(
    misplaced / 'ILSVRC2012_val_00000001.JPEG'
  )
  with pytest.raises(UserError, match=r'in the wrong class: it belongs to n01751748'):
    prepared_imagenet(tmp_path, source_dir=folders)
  (folders / 'train' / 'cats').mkdir()
  with pytest.raises(UserError, match=r'holds the folder cats; .*use folder:/path/to/root'):
    prepared_imagenet(tmp_path, source_dir=folders)
