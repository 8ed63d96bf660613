"""`ade20k` is prepared from the official zip, or its folder, byte by byte."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hivit_jax.data.builders import files as builder_files
from hivit_jax.data.builders.ade20k import Ade20k
from hivit_jax.data.class_lists import ADE20K
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from tests.data import scenes_on_disk as scenes


def prepared(folder, **options) -> Ade20k:
  builder = Ade20k(data_dir=str(folder), allow_other_counts=True, examples_per_shard=2, **options)
  builder.download_and_prepare()
  return builder


def file_bytes(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_every_byte_is_kept(tmp_path):
  files = scenes.ade20k_files()
  prepared(tmp_path, archive=scenes.ade20k_zip(tmp_path / 'ade.zip'))
  for split, official, count in (('train', 'training', 5), ('validation', 'validation', 3)):
    source: Any = open_source('ade20k', split, str(tmp_path))
    assert len(source) == count
    assert source.class_names == ADE20K.names
    np.testing.assert_array_equal(source.palette, ADE20K.palette)
    found = {}
    for i in range(count):
      stem = source.example_name(i).split('(')[1].removesuffix('.jpg)')
      found[f'images/{official}/{stem}.jpg'] = source[i]['image']
      found[f'annotations/{official}/{stem}.png'] = source[i]['segmentation']
      assert set(source[i]) == {'image', 'segmentation'}
    assert found == {name: data for name, data in files.items() if f'/{official}/' in name}


def test_zip_and_folder_give_the_same_files_also_after_a_stop(tmp_path, monkeypatch):
  folder = scenes.put(tmp_path / 'extracted', scenes.ade20k_files())
  reference = prepared(tmp_path / 'a', source_dir=folder)
  archive = scenes.ade20k_zip(tmp_path / 'ade.zip')
  read, calls = builder_files.Zip.read, []

  def stopping(self, path):
    calls.append(path)
    if len(calls) > 8:
      raise KeyboardInterrupt
    return read(self, path)

  with monkeypatch.context() as patch:
    patch.setattr(builder_files.Zip, 'read', stopping)
    with pytest.raises(KeyboardInterrupt):
      prepared(tmp_path / 'b', archive=archive)
  assert file_bytes(prepared(tmp_path / 'b', archive=archive).data_dir) == file_bytes(
    reference.data_dir
  )


def test_sources_that_are_wrong(tmp_path):
  files = scenes.ade20k_files()
  short = scenes.ade20k_zip(tmp_path / 'short.zip')
  with pytest.raises(UserError, match=r'found 5 train images in .*short\.zip, ADE20K has 20210'):
    Ade20k(data_dir=str(tmp_path), archive=short).download_and_prepare()
  del files['annotations/validation/ADE_val_00000002.png']
  lacking = scenes.ade20k_zip(tmp_path / 'lacking.zip', files)
  with pytest.raises(
    UserError, match=r'lacking\.zip: 1 of 3 images have no .*/validation/ADE_val_00000002\.jpg'
  ):
    prepared(tmp_path, archive=lacking)
  (tmp_path / 'cut.zip').write_bytes(short.read_bytes()[:-200])
  with pytest.raises(UserError, match=r'cut\.zip is damaged, truncated or no zip .* again'):
    prepared(tmp_path, archive=tmp_path / 'cut.zip')
  with pytest.raises(UserError, match=r'no\.zip does not exist'):
    prepared(tmp_path, archive=tmp_path / 'no.zip')
  with pytest.raises(UserError, match=r'there is no folder .*/images/training; give --source_dir'):
    prepared(tmp_path, source_dir=tmp_path)
  with pytest.raises(UserError, match='either --archive'):
    prepared(tmp_path)
  with pytest.raises(UserError, match=r'hivit_jax\.tools\.prepare ade20k --archive='):
    open_source('ade20k', 'train', str(tmp_path))


def test_a_damaged_member_is_named(tmp_path):
  archive = scenes.ade20k_zip(tmp_path / 'ade.zip')
  data = bytearray(archive.read_bytes())
  with zipfile.ZipFile(archive) as opened:
    info = opened.getinfo('ADEChallengeData2016/images/training/ADE_train_00000003.jpg')
  start = info.header_offset + 30 + len(info.filename)
  data[start + info.compress_size // 2] ^= 0xFF
  archive.write_bytes(data)
  with pytest.raises(UserError, match=r'ade\.zip: .*/ADE_train_00000003\.jpg is damaged'):
    prepared(tmp_path, archive=archive)
