"""`coco`, from the official zips or from folders, JPEG bytes unchanged."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from hivit_jax.data import coco, coco_files
from hivit_jax.data.builders.files import Files, Folder, Zip
from hivit_jax.data.builders.sharded import ShardedBuilder, SplitContent
from hivit_jax.data.class_lists import COCO, COCO_IDS, distinct_colours
from hivit_jax.errors import UserError

COUNTS = {'train': 118_287, 'validation': 5_000}
_FOLDERS = {'train': 'train2017', 'validation': 'val2017'}
_ANNOTATIONS = {split: f'instances_{folder}.json' for split, folder in _FOLDERS.items()}


class Coco(ShardedBuilder, skip_registration=True):
  """COCO 2017: 80 classes of objects with boxes, masks and crowds.

  TFDS's builder of that name has no masks of objects. A mask is stored as compressed run lengths
  of the size of its image.
  """

  name = 'coco'
  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self,
    *,
    data_dir: str | None = None,
    train_zip: str | os.PathLike | None = None,
    val_zip: str | os.PathLike | None = None,
    annotations_zip: str | os.PathLike | None = None,
    source_dir: str | os.PathLike | None = None,
    allow_other_counts: bool = False,
    examples_per_shard: int | None = None,
  ):
    """Says where the images are; looks at them when `download_and_prepare` runs.

    Args:
      data_dir: folder of prepared data sets; default TFDS's own.
      train_zip: train2017.zip.
      val_zip: val2017.zip. One of the two is enough.
      annotations_zip: annotations_trainval2017.zip.
      source_dir: instead of zips, a folder with `train2017/`, `val2017/` or both, and
        `annotations/`.
      allow_other_counts: accept a part of COCO.
      examples_per_shard: about how many images go into a file.
    """
    super().__init__(data_dir=data_dir, examples_per_shard=examples_per_shard)
    self._zips = {'train': train_zip, 'validation': val_zip}
    self._annotations_zip, self._source_dir = annotations_zip, source_dir
    self._allow_other_counts = allow_other_counts

  def _info(self) -> tfds.core.DatasetInfo:
    objects = {
      'boxes': tfds.features.Tensor(shape=(4,), dtype=np.float32),
      'classes': tfds.features.ClassLabel(names=list(COCO.names)),
      'area': np.float32,
      'crowd': np.int64,
      'masks': tfds.features.Text(),
    }
    return self._described(
      {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'image_id': np.int64,
        'size': tfds.features.Tensor(shape=(2,), dtype=np.int64),
        'objects': tfds.features.Sequence(objects),
      },
      ('image', 'objects'),
      distinct_colours(len(COCO.names) + 1)[1:],  # without black
      COCO_IDS,
      description='COCO 2017 with instances, as published: JPEG bytes unchanged. Boxes are (left, '
      'top, right, bottom) in pixels, masks compressed run lengths.',
      homepage='https://cocodataset.org/',
    )

  def _asked(self) -> Collection[str]:
    if self._source_dir:
      if self._annotations_zip or any(self._zips.values()):
        raise UserError('give either --source_dir or zips, not both')
      root = Path(self._source_dir).expanduser()
      found = [split for split, folder in _FOLDERS.items() if (root / folder).is_dir()]
      if not found:
        raise UserError(f'{root} holds neither train2017/ nor val2017/')
      return found
    asked = [split for split, path in self._zips.items() if path]
    if not asked or not self._annotations_zip:
      raise UserError(
        'coco needs --train_zip=train2017.zip and/or --val_zip=val2017.zip, and '
        '--annotations_zip=annotations_trainval2017.zip; or --source_dir=... with train2017/, '
        'val2017/ and annotations/'
      )
    return asked

  def _contents(self) -> dict[str, SplitContent]:
    asked = self._asked()
    if self._source_dir:
      folders = [_FOLDERS[split] for split in asked]
      advice = 'give --source_dir with train2017/, val2017/ or both, and annotations/'
      files = Folder(self._source_dir, [*folders, 'annotations'], advice)
      return {split: self._content(split, files, files) for split in asked}
    annotations = Zip(self._annotations_zip)
    images = {split: Zip(self._zips[split]) for split in asked}
    return {split: self._content(split, images[split], annotations) for split in asked}

  def _content(self, split: str, images: Files, annotations: Files) -> SplitContent:
    wanted = _ANNOTATIONS[split]
    path = next((path for path in annotations.paths if Path(path).name == wanted), None)
    if path is None:
      raise UserError(f'{annotations.root} holds no {wanted}')
    where = f'{annotations.root}: {path}'
    known = coco_files.read(where, annotations.read(path))
    if known.class_names != COCO.names or known.category_ids != COCO_IDS:
      raise UserError(
        f'{where} has other categories than COCO; a set of your own needs no preparation: '
        '--config.data.name=coco:FOLDER'
      )
    paths = {Path(path).name: path for path in images.paths if f'{_FOLDERS[split]}/' in path}
    coco_files.check_files(where, known.files, str(images.root), paths)
    if len(known) != COUNTS[split] and not self._allow_other_counts:
      raise UserError(
        f'{where} has {len(known)} images, COCO has {COUNTS[split]} for {split} (to take a part on '
        'purpose: --allow_other_counts)'
      )
    examples = _Examples(images, [paths[name] for name in known.files], known)
    size = sum(images.size(paths[name]) for name in known.files)
    return SplitContent(known.files, examples, size, known.scenes)


class _Examples(Sequence):
  """The examples of one split, read when they are asked for."""

  def __init__(self, files: Files, paths: list[str], known: coco_files.Annotations):
    self._files, self._paths, self._known = files, paths, known

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = self._known.of_image(index)
    size = int(example['size'][0]), int(example['size'][1])
    objects = example['objects']
    objects['masks'] = [coco.run_lengths(mask, size) for mask in objects['masks']]
    objects['crowd'] = objects['crowd'].astype(np.int64)
    example['size'] = example['size'].astype(np.int64)
    return {
      **example,
      'image': self._files.read(self._paths[index]),
      'file_name': self._known.files[index],
    }
