"""`imagenet2012`, from the official tar files or from folders, JPEG bytes unchanged."""

import os
from collections.abc import Collection
from pathlib import Path

import tensorflow_datasets as tfds

from hivit_jax.data.builders import imagenet_files
from hivit_jax.data.builders.sharded import ShardedBuilder, SplitContent
from hivit_jax.errors import UserError

COUNTS = {'train': 1_281_167, 'validation': 50_000}
_FOLDER_NAMES = {'train': ('train',), 'validation': ('val', 'validation')}
_LISTERS = {  # (split, whether its images lie in folders)
  ('train', False): imagenet_files.train_tar,
  ('train', True): imagenet_files.train_folder,
  ('validation', False): imagenet_files.validation_tar,
  ('validation', True): imagenet_files.validation_folder,
}


class ImageNet2012(ShardedBuilder, skip_registration=True):
  """ILSVRC 2012 in the form of TFDS's builder of that name, which needs TensorFlow.

  Name, version, features and labels are TFDS's. It differs in that the 22 CMYK images and the one
  PNG are kept as they are (TFDS re-encodes them), and in the order of the images.
  """

  name = 'imagenet2012'
  VERSION = tfds.core.Version('5.1.0')

  def __init__(
    self,
    *,
    data_dir: str | None = None,
    train_tar: str | os.PathLike | None = None,
    val_tar: str | os.PathLike | None = None,
    source_dir: str | os.PathLike | None = None,
    allow_other_counts: bool = False,
    examples_per_shard: int | None = None,
  ):
    """Says where the images are; looks at them when `download_and_prepare` runs.

    Args:
      data_dir: folder of prepared data sets; default TFDS's own.
      train_tar: ILSVRC2012_img_train.tar.
      val_tar: ILSVRC2012_img_val.tar.
      source_dir: instead of tar files, a folder with `train/<synset>/*.JPEG` and
        `val/<synset>/*.JPEG` (or `val/*.JPEG`). One of the two splits is enough.
      allow_other_counts: take a part of ImageNet, too.
      examples_per_shard: about how many images go into a file.
    """
    super().__init__(data_dir=data_dir, examples_per_shard=examples_per_shard)
    self._tars = {'train': train_tar, 'validation': val_tar}
    self._source_dir = source_dir
    self._allow_other_counts = allow_other_counts

  def _info(self) -> tfds.core.DatasetInfo:
    return self._image_classification(
      description='ILSVRC 2012, as published: JPEG bytes unchanged.',
      homepage='https://image-net.org/',
      image=tfds.features.Image(encoding_format='jpeg'),
      label=tfds.features.ClassLabel(names=imagenet_files.synsets()),
    )

  def _asked(self) -> Collection[str]:
    return self._sources()

  def _sources(self) -> dict[str, Path]:
    """Returns the tar or folder of each split."""
    tars = {split: Path(tar).expanduser() for split, tar in self._tars.items() if tar}
    if tars and self._source_dir:
      raise UserError('give either --source_dir or tar files, not both')
    if self._source_dir:
      source = Path(self._source_dir).expanduser()
      folders = {
        split: source / name
        for split, names in _FOLDER_NAMES.items()
        for name in names
        if (source / name).is_dir()
      }
      if not folders:
        raise UserError(f'{source} holds neither train/<synset>/*.JPEG nor val/<synset>/*.JPEG')
      return folders
    if not tars:
      raise UserError(
        'imagenet2012 needs --train_tar=ILSVRC2012_img_train.tar and/or '
        '--val_tar=ILSVRC2012_img_val.tar, or --source_dir=... with train/ and val/'
      )
    for tar in tars.values():  # before minutes go into listing the first of them
      if not tar.is_file():
        raise UserError(f'{tar} does not exist')
    return tars

  def _contents(self) -> dict[str, SplitContent]:
    contents = {}
    for split, path in self._sources().items():
      images = _LISTERS[split, path.is_dir()](path)
      self._check_count(split, images)
      contents[split] = SplitContent(images.names, images, images.num_bytes())
    return contents

  def _check_count(self, split: str, images: imagenet_files.ImageFiles) -> None:
    if len(images) and (self._allow_other_counts or len(images) == COUNTS[split]):
      return
    missing = images.missing_classes()
    classes = f'; no image of {len(missing)} classes, {missing[0]} first' if missing else ''
    raise UserError(
      f'found {len(images)} {split} images, ImageNet 2012 has {COUNTS[split]}{classes}: something '
      'is incomplete (to use a part on purpose: --allow_other_counts)'
    )
