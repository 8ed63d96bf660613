"""COCO-style folders, and COCO itself prepared: every byte, and every mistake in one line."""

import contextlib
import copy
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from hivit_jax.data import coco, coco_files
from hivit_jax.data import detection_transforms as transforms
from hivit_jax.data.builders import files as builder_files
from hivit_jax.data.builders.coco import Coco
from hivit_jax.data.class_lists import COCO, COCO_IDS
from hivit_jax.data.decode import BrokenImage
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from tests.data import coco_on_disk as on_disk
from tests.data.scenes_on_disk import put


def prepared(folder, **options) -> Coco:
  builder = Coco(data_dir=str(folder), allow_other_counts=True, examples_per_shard=2, **options)
  builder.download_and_prepare()
  return builder


def by_id(source: Any) -> dict[int, dict]:
  return {source[i]['image_id']: source[i] for i in range(len(source))}


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
  return put(tmp_path_factory.mktemp('coco'), on_disk.official())


def test_a_folder_and_the_prepared_set_have_the_same_scenes(root, tmp_path):
  files = on_disk.official()
  prepared(tmp_path, **on_disk.zips(tmp_path / 'zips', files))
  for own, name, count in (('train', 'train', 5), ('val', 'validation', 3)):
    folder: Any = open_source(f'coco:{root}', own)
    records: Any = open_source('coco', name, str(tmp_path))
    assert len(folder) == len(records) == count
    for source in (folder, records):
      assert source.class_names == COCO.names
      assert tuple(source.category_ids) == COCO_IDS
    # The same order, whatever the set is read from.
    assert [folder[i]['image_id'] for i in range(count)] == [
      records[i]['image_id'] for i in range(count)
    ]
    np.testing.assert_array_equal(folder.scenes, records.scenes)
    for i in range(count):
      one, two = folder[i], records[i]
      assert one['image'] == two['image'] == files[f'{own}2017/{one["image_id"] - 1000:012d}.jpg']
      scenes = transforms.scene(one), transforms.scene(two)
      for field in ('image', 'boxes', 'labels', 'masks', 'crowd'):
        np.testing.assert_array_equal(getattr(scenes[0], field), getattr(scenes[1], field))
      np.testing.assert_array_equal(one['objects']['area'], two['objects']['area'])


def test_objects_are_those_of_the_file(root):
  source: Any = open_source(f'coco:{root}', 'train')
  content = on_disk.annotated(5)
  examples = by_id(source)
  for image in content['images']:
    example = examples[image['id']]
    wanted = [a for a in content['annotations'] if a['image_id'] == image['id']]
    scene = transforms.scene(example)
    assert scene.size == tuple(example['size']) == (image['height'], image['width'])
    assert scene.crowd.tolist() == [bool(a['iscrowd']) for a in wanted]
    assert scene.labels.tolist() == [COCO_IDS.index(a['category_id']) for a in wanted]
    left, top, width, height = np.array([a['bbox'] for a in wanted]).reshape(-1, 4).T
    expected = np.stack([left, top, left + width, top + height], axis=1)
    np.testing.assert_array_equal(scene.boxes, expected)
    areas = [int(a['area']) for a in wanted]
    assert scene.masks.sum(axis=(1, 2)).tolist() == areas
  # Of the image with a crowd, one object can be learnt from; of the one with nothing, none.
  known = {source[i]['image_id']: source.scenes[i].tolist() for i in range(5)}
  assert known[1001] == [64, 48, 1]
  assert known[1003] == [48, 64, 0]


def test_a_source_goes_to_worker_processes_and_can_be_cut(root):
  source: Any = open_source(f'coco:{root}', 'train[:3]+val')
  copied = pickle.loads(pickle.dumps(source))
  assert len(copied) == 6
  for i in range(6):
    assert source[i]['image'] == copied[i]['image']
    assert source.example_name(i).endswith(f'{source[i]["image_id"] - 1000:012d}.jpg')
  with pytest.raises(IndexError):
    source[6]
  with pytest.raises(UserError, match=r"has no split 'test'; it has: train, val"):
    open_source(f'coco:{root}', 'test')


LAYOUTS = {
  'images/SPLIT': ('images/train', 'annotations/instances_train.json'),
  'all in images': ('images', 'annotations/train.json'),
  'beside': ('train', 'train/_annotations.coco.json'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_other_layouts(layout, tmp_path):
  folder, annotations = LAYOUTS[layout]
  put(tmp_path, on_disk.files_of(on_disk.annotated(2), folder, annotations))
  assert set(by_id(open_source(f'coco:{tmp_path}', 'train'))) == {1000, 1001}


def test_an_image_of_another_size_is_broken(root):
  example = open_source(f'coco:{root}', 'train')[0]
  other = {**example, 'image': on_disk.photo(0, (10, 20))}
  height, width = example['size']
  message = rf'has 20x10 pixels, by its annotations {width}x{height}'
  for use in (transforms.scene, transforms.EvalTransform(32, 64, (64, 64))):
    with pytest.raises(BrokenImage, match=message):
      use(other)
  large = coco.encode(np.ones((100, 100)))['counts']
  damaged = {**example, 'objects': {**example['objects'], 'masks': [large]}}
  damaged['objects'] |= {'classes': [0], 'boxes': np.ones((1, 4)), 'crowd': [0]}
  with pytest.raises(BrokenImage, match='a mask is damaged'):
    transforms.scene(damaged)


def test_an_image_that_exif_turns_is_broken_with_that_reason(root):
  example = open_source(f'coco:{root}', 'train')[0]
  height, width = example['size']
  exif, file = Image.Exif(), io.BytesIO()
  exif[ExifTags.Base.Orientation] = 6
  Image.new('RGB', (height, width)).save(file, 'JPEG', exif=exif)
  with pytest.raises(BrokenImage, match=rf'{height}x{width} pixels \(EXIF turns it\), by its'):
    transforms.scene({**example, 'image': file.getvalue()})


def test_objects_of_no_use_are_counted_and_named(tmp_path, caplog):
  content = on_disk.annotated(2)
  keep = content['annotations'][0]
  wrong = [
    {**keep, 'id': 91, 'bbox': [5, 5, 0, 9]},
    {**keep, 'id': 92, 'bbox': [500, 5, 9, 9]},
    {**keep, 'id': 93, 'segmentation': [[1, 2, 3, 4]]},
    {**keep, 'id': 94, 'segmentation': []},
  ]
  del keep['area']
  content['annotations'] = [keep, *wrong]
  path = tmp_path / 'some.json'
  path.write_text(json.dumps(content))
  with caplog.at_level(logging.WARNING):
    found = coco_files.read(str(path))
  assert '4 of 5 objects have no area within their image and are left out: annotation 91' in (
    caplog.text
  )
  objects = found.of_image(0)['objects']
  assert objects['area'].tolist() == [coco.decode(keep['segmentation'], (48, 64)).sum()]
  assert found.scenes[:, 2].tolist() == [1, 0]


def change(**changes):
  def of(content):
    content['annotations'][0] |= changes

  return of


def twice(kind, key):
  def of(content):
    content[kind][1] = {**content[kind][1], key: content[kind][0][key]}

  return of


MISTAKES = {
  'image_id=7, which is not among the images': change(image_id=7),
  r'image_id=\[1000\], which is not among the images': change(image_id=[1000]),
  r"category_id=\{'id': 1\}, which is not among the categories": change(category_id={'id': 1}),
  r'no object has a mask \(segmentation is empty\), and masks are learnt from it': (
    lambda content: [one.update(segmentation=[]) for one in content['annotations']]
  ),
  'category_id=12, which is not among the categories': change(category_id=12),
  r'annotation 1 has bbox=\[1, 2\], expected \[left, top': change(bbox=[1, 2]),
  r'annotation 1 has bbox=\[1, 2, nan': change(bbox=[1, 2, float('nan'), 4]),
  'annotation 1 has no segmentation': change(segmentation=None),
  r'segmentation=.*of an image of size \[48, 64\]': change(
    segmentation={'size': [64, 48], 'counts': 'x'}
  ),
  'expected polygons': change(segmentation=[1, 2, 3, 4, 5, 6]),
  'expected polygons .* or RLE': change(segmentation={'size': [48, 64], 'counts': [5]}),
  'two of the images have the id 1000': twice('images', 'id'),
  'two of the images have the file_name': twice('images', 'file_name'),
  'two of the annotations have the id 1': twice('annotations', 'id'),
  'two of the categories have the name': twice('categories', 'name'),
  "no list 'categories'": lambda content: content.pop('categories'),
  'has no images': lambda content: content['images'].clear(),
  r"images\[1\] has the id '1'": lambda content: content['images'][1].update(id='1'),
  'height=0 of id 1000 in images: expected a number': lambda content: content['images'][0].update(
    height=0
  ),
}


@pytest.mark.parametrize('message', MISTAKES)
def test_what_is_wrong_in_a_file_is_one_line(message):
  content = copy.deepcopy(on_disk.annotated(3))
  MISTAKES[message](content)
  with pytest.raises(UserError, match=rf'here\.json.*{message}') as error:
    coco_files.read('here.json', json.dumps(content))
  assert '\n' not in str(error.value)


def test_a_folder_may_begin_with_digits_and_a_version_is_the_prepared_set(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  put(tmp_path / '2024_birds', on_disk.official())
  assert len(open_source('coco:2024_birds', 'train')) == 5
  for version in ('1.0.0', '1.*.*'):
    with pytest.raises(UserError, match='is not prepared'):
      open_source(f'coco:{version}', 'train', str(tmp_path))


def test_files_that_are_wrong_or_missing(root, tmp_path):
  with pytest.raises(UserError, match=r'x\.json is not JSON, or only a part of it'):
    coco_files.read('x.json', '{"images": [')
  with pytest.raises(UserError, match='holds a list, such as of results'):
    coco_files.read('x.json', '[]')
  with pytest.raises(UserError, match=r'holds no annotations; expected <root>/annotations'):
    open_source(f'coco:{tmp_path}', 'train')
  files = on_disk.official()
  del files['train2017/000000000002.jpg']
  put(tmp_path, files)
  with pytest.raises(
    UserError, match=r'5 images, and 1 of them are not in .*train2017: 000000000002\.jpg'
  ):
    open_source(f'coco:{tmp_path}', 'train')
  assert len(open_source(f'coco:{tmp_path}', 'val')) == 3


def test_a_stopped_preparation_goes_on_to_the_same_files(root, tmp_path, monkeypatch):
  reference = prepared(tmp_path / 'a', source_dir=root)
  zips = on_disk.zips(tmp_path / 'zips', on_disk.official())
  read, calls = builder_files.Zip.read, []

  def stopping(self, path):
    calls.append(path)
    if len(calls) > 6:
      raise KeyboardInterrupt
    return read(self, path)

  with monkeypatch.context() as patch:
    patch.setattr(builder_files.Zip, 'read', stopping)
    with contextlib.suppress(KeyboardInterrupt):
      prepared(tmp_path / 'b', **zips)
  assert len(calls) > 6
  again = prepared(tmp_path / 'b', **zips)
  contents = [
    {path.name: path.read_bytes() for path in Path(builder.data_dir).iterdir()}
    for builder in (reference, again)
  ]
  assert contents[0] == contents[1]


def test_preparing_names_what_is_wrong(root, tmp_path):
  zips = on_disk.zips(tmp_path / 'zips', on_disk.official())
  with pytest.raises(UserError, match=r'5 images, COCO has 118287 for train \(to take a part'):
    Coco(data_dir=str(tmp_path), source_dir=root).download_and_prepare()
  with pytest.raises(UserError, match='coco needs --train_zip='):
    prepared(tmp_path, train_zip=zips['train_zip'])
  with pytest.raises(UserError, match='either --source_dir or zips'):
    prepared(tmp_path, source_dir=root, **zips)
  with pytest.raises(UserError, match=r'holds neither train2017/ nor val2017/'):
    prepared(tmp_path, source_dir=tmp_path)
  with pytest.raises(UserError, match=r'val_zip\.zip holds no instances_val2017\.json'):
    prepared(tmp_path, val_zip=zips['val_zip'], annotations_zip=zips['val_zip'])
  other = on_disk.official()
  content = json.loads(other['annotations/instances_val2017.json'])
  content['categories'].append({'id': 91, 'name': 'moose'})
  other['annotations/instances_val2017.json'] = json.dumps(content).encode()
  with pytest.raises(UserError, match=r'other categories than COCO.*coco:FOLDER'):
    prepared(tmp_path, **on_disk.zips(tmp_path / 'other', other))
  with pytest.raises(UserError, match=r'tools\.prepare coco --train_zip='):
    open_source('coco', 'train', str(tmp_path))
  only = {key: zips[key] for key in ('val_zip', 'annotations_zip')}
  prepared(tmp_path, **only)
  with pytest.raises(UserError, match='was prepared before without train; delete'):
    prepared(tmp_path, **zips)
