"""Where images come from: `open_source` and what it returns."""

import difflib
import logging
from typing import Protocol

from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)


class Source(Protocol):
  """Encoded images with labels, read by index in any order.

  Picklable, so that worker processes can have it, and safe to read from several threads.

  Attributes:
    name: the data set as the user named it.
    split: the split as the user gave it.
    class_names: names of the classes; a label is an index into them, or -1 where it is unknown
      (the test split of ImageNet).
  """

  name: str
  split: str
  class_names: tuple[str, ...]

  @property
  def num_classes(self) -> int: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict:
    """Returns `image` (bytes of an image file) and `label` (int) of example `index` >= 0."""
    ...

  def example_name(self, index: int) -> str:
    """Returns a name for log lines: a path, or `imagenet2012/train[123] (n01440764_18.JPEG)`."""
    ...


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
  """Opens one split of a data set.

  Args:
    name: `folder:/path/to/root` for `<root>/<split>/<class>/*.jpg`; the embedded `photo_tiles` or
      `digits`, which are prepared in `data_dir` on first use; or a data set of TFDS, with an
      optional config and version (`name/config:1.0.0`), that was prepared as ArrayRecord.
    split: a split or slices of it: `train`, `train[:90%]`, `train[1000:]+validation`.
    data_dir: folder of prepared data sets; default TFDS's own (TFDS_DATA_DIR or
      ~/tensorflow_datasets). Without effect on `folder:`.

  Returns:
    The source, its order of examples always the same.

  Raises:
    UserError: if the data set is unknown or not there (with the folders looked in and the
      commands that prepare it), is stored in another format, or lacks the split.
  """
  if name.startswith('folder:'):
    from hivit_jax.data.sources.folder import FolderSource

    return FolderSource(name.removeprefix('folder:'), split)

  # Imported here: TFDS takes a third of a second, which folders need not pay.
  from hivit_jax.data import builders
  from hivit_jax.data.sources import tfds as tfds_source

  wanted = tfds_source.DatasetName.parse(name)
  if wanted.name in builders.EMBEDDED:
    builder = builders.EMBEDDED[wanted.name](data_dir=data_dir)
    if wanted.config or wanted.version not in (None, str(builder.version)):
      raise UserError(f'{name}: the embedded set is {wanted.name}:{builder.version}, no other')
    if not builder.is_ready():
      _log.info('preparing %s in %s (once)', wanted.name, builder.data_dir)
      builder.download_and_prepare()
    return tfds_source.TfdsSource(name, split, builder.data_path)
  folder = tfds_source.find_prepared(wanted, data_dir)
  if folder is None:
    raise _not_prepared(wanted, data_dir)
  return tfds_source.TfdsSource(name, split, folder)


def _not_prepared(wanted, data_dir: str | None) -> UserError:
  """Returns the error for a set that is nowhere: unknown, or known but not prepared."""
  import tensorflow_datasets as tfds

  from hivit_jax.data import builders
  from hivit_jax.data.sources import tfds as tfds_source

  known = {*tfds.list_builders(with_community_datasets=False), *builders.EMBEDDED}
  folders = tfds_source.data_dirs(data_dir)
  looked = ', '.join(str(folder / wanted.name) for folder in folders)
  if wanted.name not in known:
    close = difflib.get_close_matches(wanted.name, known, n=3)
    if wanted.name.lower().startswith(('imagenet', 'ilsvrc')):  # others only sound more like it
      close = ['imagenet2012', *(name for name in close if name != 'imagenet2012')][:3]
    guess = f' Did you mean {" or ".join(close)}?' if close else ''
    return UserError(
      f'unknown data set {wanted.name!r}: not one of TFDS, and not prepared in {looked}.{guess} '
      'For images of your own: --config.data.name=folder:/path/to/root'
    )
  begun = any(next((folder / wanted.name).glob('incomplete.*'), None) for folder in folders)
  return UserError(
    f'{wanted} is not prepared{" (only begun)" if begun else ""}: looked in {looked}. '
    'To prepare it: '
    f'{tfds_source.preparation(wanted, folders[0])}. If it lies elsewhere, say where: '
    '--config.data.data_dir=FOLDER'
  )
