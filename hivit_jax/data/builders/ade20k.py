"""`ade20k`, from the official zip or from a folder, JPEG and PNG bytes unchanged."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from hivit_jax.data.builders.files import Files, Folder, Zip
from hivit_jax.data.builders.sharded import ShardedBuilder, SplitContent
from hivit_jax.data.class_lists import ADE20K
from hivit_jax.data.sources.layouts import matched
from hivit_jax.errors import UserError

COUNTS = {'train': 20_210, 'validation': 2_000}
_FOLDERS = {'train': 'training', 'validation': 'validation'}
_MEMBER = re.compile(
  r'(?:.*/)?(?P<kind>images|annotations)/(?P<split>training|validation)/(?P<file>[^/.][^/]*)'
)
_SUFFIXES = {'images': '.jpg', 'annotations': '.png'}


class Ade20k(ShardedBuilder, skip_registration=True):
  """Scene parsing of MIT's 2016 challenge: 150 classes, stored as 1 to 150; 0 is anything else."""

  name = 'ade20k'
  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self,
    *,
    data_dir: str | None = None,
    archive: str | os.PathLike | None = None,
    source_dir: str | os.PathLike | None = None,
    allow_other_counts: bool = False,
    examples_per_shard: int | None = None,
  ):
    """Says where the images are; looks at them when `download_and_prepare` runs.

    Args:
      data_dir: folder of prepared data sets; default TFDS's own.
      archive: ADEChallengeData2016.zip.
      source_dir: instead of it, the folder ADEChallengeData2016 that comes out of it.
      allow_other_counts: take a part of ADE20K, too.
      examples_per_shard: about how many images go into a file.
    """
    super().__init__(data_dir=data_dir, examples_per_shard=examples_per_shard)
    self._archive, self._source_dir = archive, source_dir
    self._allow_other_counts = allow_other_counts

  def _info(self) -> tfds.core.DatasetInfo:
    names, palette = list(ADE20K.names), ADE20K.palette
    return self._described(
      {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'segmentation': tfds.features.LabeledImage(
          labels=names, shape=(None, None, 1), encoding_format='png'
        ),
      },
      ('image', 'segmentation'),
      palette,
      description='ADE20K of the scene parsing challenge of 2016, as published: JPEG and PNG bytes '
      'unchanged. Class c is stored as c + 1; 0 has no class.',
      homepage='http://sceneparsing.csail.mit.edu/',
    )

  def _contents(self) -> dict[str, SplitContent]:
    files = self._files()
    contents = {}
    for split, folder in _FOLDERS.items():
      found: dict[str, dict[str, str]] = {'images': {}, 'annotations': {}}
      for path in files.paths:
        match = _MEMBER.fullmatch(path)
        if match and match['split'] == folder and path.endswith(_SUFFIXES[match['kind']]):
          found[match['kind']][path] = match['file'][:-4]
      stems = found['images'] | found['annotations']
      pairs = matched(str(files.root), found['images'], found['annotations'], stems.__getitem__)
      self._check_count(split, len(pairs), files.root)
      pairs.sort()
      size = sum(files.size(path) for pair in pairs for path in pair)
      names = [image.rsplit('/', 1)[-1] for image, _ in pairs]
      contents[split] = SplitContent(names, _Pairs(files, pairs, names), size)
    return contents

  def _files(self) -> Files:
    if bool(self._archive) == bool(self._source_dir):
      raise UserError(
        'ade20k needs either --archive=ADEChallengeData2016.zip or --source_dir with images/ and '
        'annotations/'
      )
    if self._archive:
      return Zip(self._archive)
    folders = [f'{kind}/{split}' for kind in _SUFFIXES for split in _FOLDERS.values()]
    return Folder(self._source_dir, folders, 'give --source_dir=.../ADEChallengeData2016')

  def _check_count(self, split: str, count: int, root: Path) -> None:
    if count and (self._allow_other_counts or count == COUNTS[split]):
      return
    raise UserError(
      f'found {count} {split} images in {root}, ADE20K has {COUNTS[split]}, in '
      f'images/{_FOLDERS[split]}: something is incomplete (to take a part on purpose: '
      '--allow_other_counts)'
    )


class _Pairs(Sequence):
  """The examples of one split, read when they are asked for."""

  def __init__(self, files: Files, pairs: list[tuple[str, str]], names: list[str]):
    self._files, self._pairs, self._names = files, pairs, names

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, index: int) -> dict:
    image, labels = map(self._files.read, self._pairs[index])
    return {'image': image, 'segmentation': labels, 'file_name': self._names[index]}
