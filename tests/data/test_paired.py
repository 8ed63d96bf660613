"""Images with label maps: what is found in each layout, and what is wrong in it."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data import class_lists
from hivit_jax.data import segmentation_transforms as seg
from hivit_jax.data.decode import BrokenImage
from hivit_jax.data.loader import eval_loader
from hivit_jax.data.sources.base import open_source
from hivit_jax.data.sources.paired import PairedSource
from hivit_jax.errors import UserError
from tests import helpers
from tests.data import scenes_on_disk as scenes


def decoded(data) -> np.ndarray:
  return data if isinstance(data, np.ndarray) else np.asarray(Image.open(io.BytesIO(data)))


def own(root, classes: bytes = b'road\nsky\ntree\n', name: str = 'classes.txt'):
  """Images of several kinds and depths."""
  files = {name: classes}
  for split, count in (('train', 6), ('val', 3)):
    for i in range(count):
      stem = f'{split}/{"deep/er/" if i % 2 else ""}{i}'
      ending = ('jpg', 'PNG')[i % 2]
      files[f'images/{stem}.{ending}'] = scenes.photo(i * 40, kind='JPEG' if i % 2 == 0 else 'PNG')
      files[f'annotations/{stem}.png'] = scenes.encoded(np.full((12, 18), i % 3, np.uint8))
  return scenes.put(root, files)


def test_class_lists_are_those_of_mmsegmentation():
  expected = json.loads((helpers.GOLDEN / 'segmentation_classes.json').read_text())
  for name, ours in (
    ('ade20k', class_lists.ADE20K),
    ('cityscapes', class_lists.CITYSCAPES),
    ('pascal_voc', class_lists.VOC),
  ):
    assert list(ours.names) == expected[name]['names']
    assert ours.palette.tolist() == expected[name]['palette']


def test_own_folders(tmp_path):
  source = open_source(f'folder:{own(tmp_path)}', 'train')
  assert isinstance(source, PairedSource)
  assert source.class_names == ('road', 'sky', 'tree')
  assert source.palette.tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
  assert len(source) == 6
  source = pickle.loads(pickle.dumps(source))
  for i in range(6):
    example = source[i]
    number = decoded(example['image'])[0, 0, 0] // 40
    assert (decoded(example['segmentation']) == number % 3).all()
    image, labels = source.example_name(i).split(' with ')
    assert decoded(Path(image).read_bytes())[0, 0, 0] // 40 == number
    assert labels.startswith(f'{tmp_path}/annotations/train/')
  joined = open_source(f'folder:{tmp_path}', 'val+train[:50%]')
  assert len(joined) == 6
  assert joined[3]['image'] == source[0]['image']
  with pytest.raises(UserError, match="has no split 'test'; it has: train, val"):
    open_source(f'folder:{tmp_path}', 'test')
  with pytest.raises(IndexError, match='has 6 examples, asked for 6'):
    source[6]


def test_classes_with_colours(tmp_path):
  listed = {'names': ['a', 'b', 'c'], 'palette': [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
  source = open_source(
    f'folder:{own(tmp_path, json.dumps(listed).encode(), "classes.json")}', 'val'
  )
  assert source.class_names == ('a', 'b', 'c')
  assert source.palette.tolist() == listed['palette']
  assert source.palette.dtype == np.uint8


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('classes.txt', b'a\n\nb', r'classes\.txt has to hold a name for each class'),
    ('classes.txt', b'a\nb\na\n', r"classes\.txt has the class 'a' twice"),
    ('classes.json', b'["a"', r'classes\.json is not JSON'),
    ('classes.json', b'{"classes": ["a"]}', r'classes\.json has to hold a name for each'),
    ('classes.json', b'{"names": ["a"], "palette": [[1, 2]]}', r'"palette" has to hold \[red'),
    ('classes.json', b'{"names": ["a"], "palette": [[1, 2, 256]]}', '"palette" has to hold'),
    ('names.txt', b'a', r'holds no classes\.txt \(a name a line, .* no classes\.json'),
  ],
)
def test_class_lists_that_are_wrong(tmp_path, name, content, message):
  with pytest.raises(UserError, match=message):
    open_source(f'folder:{own(tmp_path, content, name)}', 'train')


def test_an_image_and_a_label_map_need_each_other(tmp_path):
  root = own(tmp_path)
  (root / 'annotations/train/deep/er/3.png').rename(root / 'other.png')
  with pytest.raises(
    UserError, match=r'1 of 6 images have no label map: images/train/deep/er/3\.PNG; add'
  ):
    open_source(f'folder:{root}', 'train')
  (root / 'images/train/deep/er/3.PNG').unlink()
  assert len(open_source(f'folder:{root}', 'train')) == 5
  (root / 'images/train/0.jpg').unlink()
  with pytest.raises(
    UserError, match=r'1 of 5 label maps have no image: annotations/train/0\.png; add'
  ):
    open_source(f'folder:{root}', 'train')
  (root / 'images/val/2.png').write_bytes(scenes.photo(0))
  with pytest.raises(UserError, match=r'both images/val/2\.\w+ and images/val/2\.\w+; their'):
    open_source(f'folder:{root}', 'val')
  (root / 'images/val/2.png').unlink()
  shutil.rmtree(root / 'annotations/val')
  with pytest.raises(UserError, match='3 of 3 images have no label map: images/val'):
    open_source(f'folder:{root}', 'val')


def test_label_maps_in_colours_are_refused_at_once(tmp_path):
  root = own(tmp_path)
  for path in (root / 'annotations/val').rglob('*.png'):
    path.write_bytes(scenes.photo(3, kind='PNG'))
  with pytest.raises(
    UserError,
    match=r'annotations/val/.*\.png: label map: has mode RGB; .* whose numbers are classes',
  ):
    open_source(f'folder:{root}', 'val')
  jpeg = root / 'annotations/train/0.jpg'
  (root / 'annotations/train/0.png').rename(jpeg)
  with pytest.raises(UserError, match=r'have to be PNG files, not annotations/train/0\.jpg'):
    open_source(f'folder:{root}', 'train')


@pytest.mark.parametrize(
  ('labels', 'reason'),
  [
    (np.full((12, 18), 7, np.uint8), 'label map: has class 7; the 3 classes are 0 to 2'),
    (np.zeros((12, 17), np.uint8), 'the image has 18x12 pixels, its label map 17x12'),
  ],
)
def test_a_label_map_that_does_not_fit_is_named(tmp_path, labels, reason):
  root = own(tmp_path)
  path = root / 'annotations/val/0.png'
  path.write_bytes(scenes.encoded(labels))
  source = open_source(f'folder:{root}', 'val')
  transform = seg.EvalTransform(seg.ClassMap(source.num_classes))
  with eval_loader(source, transform, batch_size=3, max_broken_fraction=1.0) as loader:
    list(loader)
  (told,) = loader.broken.values()
  assert told.startswith(f'{root}/images/val/0.jpg with {path} ({reason}')


def test_ade20k_extracted(tmp_path):
  source = open_source(f'folder:{scenes.put(tmp_path, scenes.ade20k_files())}', 'validation')
  assert len(source) == 3
  assert source.class_names[:2] == ('wall', 'building')
  assert len(source.palette) == source.num_classes == 150
  classes = seg.ClassMap(150, reduce_zero_label=True)
  for i in range(3):
    number = decoded(source[i]['image'])[0, 0, 0]
    labels = seg.EvalTransform(classes)(source[i])['label_map']
    assert np.unique(labels[:2]) == 255
    assert np.unique(labels[2:-1]) == number - 1
    assert np.unique(labels[-1]) == 149
  with pytest.raises(BrokenImage, match=r'has class 150; .* 0 to 149.* reduce_zero_label'):
    seg.ClassMap(150)({'segmentation': Image.open(io.BytesIO(source[0]['segmentation']))})


def test_voc(tmp_path):
  root = scenes.voc(tmp_path)
  source = open_source(f'folder:{root}', 'train')
  assert len(source) == 4
  assert source.num_classes == 21
  for i in range(4):
    number = decoded(source[i]['image'])[0, 0, 0]
    labels = seg.EvalTransform(seg.ClassMap(21))(source[i])['label_map']
    assert np.unique(labels[0]) == 255
    assert np.unique(labels[1:]) == number
  assert len(open_source(f'folder:{root}', 'val')) == 2
  with pytest.raises(UserError, match="has no split 'test'; it has: train, trainval, val"):
    open_source(f'folder:{root}', 'test')
  (root / 'SegmentationClass/2007_000005.png').unlink()
  with pytest.raises(
    UserError, match=r'val\.txt lists 2 images, and 1 .* SegmentationClass/2007_0'
  ):
    open_source(f'folder:{root}', 'val')


@pytest.mark.parametrize('train_ids', [True, False])
def test_cityscapes(tmp_path, train_ids):
  root = scenes.cityscapes(tmp_path, train_ids)
  source = open_source(f'folder:{root}', 'train')
  assert len(source) == 5
  assert source.class_names[18] == 'bicycle'
  labels = seg.EvalTransform(seg.ClassMap(19))(source[3])['label_map']
  assert labels.dtype == np.uint8
  assert labels[:, 5].tolist() == [1, 18, 255, 1, 1, 1, 1, 1]
  ending = 'labelTrainIds' if train_ids else 'labelIds'
  lacking = root / f'gtFine/val/munster/munster_000001_000019_gtFine_{ending}.png'
  lacking.unlink()
  with pytest.raises(UserError, match=r'1 of 2 images have no .*munster_000001_000019_leftImg8bit'):
    open_source(f'folder:{root}', 'val')


def test_images_named_like_a_layout_are_still_classes(tmp_path):
  scenes.put(tmp_path, {'images/a/1.jpg': scenes.photo(1), 'images/b/1.jpg': scenes.photo(2)})
  source = open_source(f'folder:{tmp_path}', 'images')
  assert source.class_names == ('a', 'b')
