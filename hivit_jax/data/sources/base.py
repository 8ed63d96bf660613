"""Where examples come from: `open_source` and what it returns."""

import difflib
import inspect
import logging
import re
from typing import Any, Protocol

from hivit_jax import settings
from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)
_COCO_VERSION = re.compile(r'coco:[\d*]+(\.[\d*]+){2}')  # of the prepared data set
_MEMBERS = (
  *('name', 'split', 'class_names', 'num_classes', 'example_name', '__len__', '__getitem__'),
)


class Source(Protocol):
  """Examples, read by index in any order.

  Picklable, so that worker processes can have it, and safe to read from several threads.

  Attributes:
    name: the data set as the user named it.
    split: the split as the user gave it.
    class_names: names of the classes, which labels of any kind are indices into; may be empty.
    palette: optional, uint8 (classes, 3): colours of the classes.
    category_ids: optional, ids of the classes in result files; without them, their indices.
    scenes: optional, int32 (len, 3): height, width, and number of objects that can be learnt from
      (no crowds, sides of a pixel or more) of each example, known before any is read.
  """

  name: str
  split: str
  class_names: tuple[str, ...]

  @property
  def num_classes(self) -> int: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns example `index` >= 0: an image and whatever is known of it.

    ============== ==========================================================================
    key            value
    ============== ==========================================================================
    `image`        bytes of an image file, see `decode` and `pixels`, or (H, W) or (H, W, C)
    `label`        int, its class; -1, or no such key: unknown (the test split of ImageNet)
    `segmentation` bytes of a PNG file of the same size, or integers (H, W): a class a pixel
    `objects`      dict with `boxes`, float (n, 4), and what has a row a box, see below
    `size`         (2,) height and width that `objects` are for
    `image_id`     int, which result files name the image by
    `instances`    like `segmentation`: `objects['instance']` where it is seen, 0 elsewhere
    ============== ==========================================================================

    For detection `objects` has `classes`, `masks` as `coco.run_lengths` takes them (or there are
    `instances`), and perhaps `crowd` and `area`.

    Further keys are of use to transforms that know them. An example that cannot be read raises
    OSError or RuntimeError: the loader counts and replaces it.
    """
    ...

  def example_name(self, index: int) -> str:
    """Returns a name for log lines: a path, or `imagenet2012/train[123] (n01440764_18.JPEG)`."""
    ...


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
  """Opens one split of a data set.

  Args:
    name: `folder:/path/to/root` for `<root>/<split>/<class>/*.jpg`, or for images with label maps
      in one of the layouts of `layouts.layout_of`; the embedded `photo_tiles`,
      `photo_scenes` or `digits`, which are prepared in `data_dir` on first use; a data set of TFDS,
      with an optional config and version (`name/config:1.0.0`), that was prepared as ArrayRecord;
      `coco:/path/to/root` for images with objects, see `coco.find_files`; or a class of your own,
      `package.module:Name`, which is called as `Name(split=..., data_dir=...)`.
    split: a split or slices of it: `train`, `train[:90%]`, `train[1000:]+validation`.
    data_dir: folder of prepared data sets; default TFDS's own (TFDS_DATA_DIR or
      ~/tensorflow_datasets). Without effect on `folder:` and `coco:`.

  Returns:
    The source, its order of examples always the same.

  Raises:
    UserError: if the data set is unknown or not there (with the folders looked in and the
      commands that prepare it), is stored in another format, lacks the split, or is no `Source`.
  """
  if name.startswith('folder:'):
    from hivit_jax.data.sources.folder import FolderSource
    from hivit_jax.data.sources.layouts import find_paired
    from hivit_jax.data.sources.paired import PairedSource

    root = name.removeprefix('folder:')
    paired = find_paired(root)
    if paired == root:
      return PairedSource(root, split)
    try:
      return FolderSource(root, split)
    except UserError as error:
      if paired is None:
        raise
      raise UserError(f'{error}; {paired} has images with label maps: folder:{paired}') from error
  if name.startswith('coco:') and not _COCO_VERSION.fullmatch(name):
    from hivit_jax.data.sources.coco import CocoSource

    return CocoSource(name.removeprefix('coco:'), split)
  if settings.is_imported(name):  # TFDS names have numbers behind their colon
    return _imported(name, split, data_dir)

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


def _imported(name: str, split: str, data_dir: str | None) -> Source:
  make = settings.imported(name, 'config.data.name')
  options = {'split': split, 'data_dir': data_dir}
  try:
    inspect.signature(make).bind(**options)
  except TypeError as error:
    raise UserError(
      f'config.data.name={name} has to take the arguments split and data_dir: {error}'
    ) from error
  source = make(**options)
  missing = [key for key in _MEMBERS if not hasattr(source, key)]
  if missing:
    raise UserError(
      f'config.data.name={name} is no source of examples: it has no {", ".join(missing)}; see '
      'hivit_jax.data.sources.base.Source'
    )
  return source


def _not_prepared(wanted, data_dir: str | None) -> UserError:
  """Returns the error for a set that is nowhere: unknown, or known but not prepared."""
  import tensorflow_datasets as tfds

  from hivit_jax.data import builders
  from hivit_jax.data.sources import tfds as tfds_source

  known = {*tfds.list_builders(with_community_datasets=False), *builders.EMBEDDED, 'ade20k', 'coco'}
  folders = tfds_source.data_dirs(data_dir)
  looked = ', '.join(str(folder / wanted.name) for folder in folders)
  if wanted.name not in known:
    close = difflib.get_close_matches(wanted.name, known, n=3)
    if wanted.name.lower().startswith(('imagenet', 'ilsvrc')):  # others only sound more like it
      close = ['imagenet2012', *(name for name in close if name != 'imagenet2012')][:3]
    guess = f' Did you mean {" or ".join(close)}?' if close else ''
    return UserError(
      f'unknown data set {wanted.name!r}: not one of TFDS, and not prepared in {looked}.{guess} '
      'For your own images: --config.data.name=folder:/path/to/root'
    )
  begun = any(next((folder / wanted.name).glob('incomplete.*'), None) for folder in folders)
  return UserError(
    f'{wanted} is not prepared{" (only started)" if begun else ""}: looked in {looked}. '
    'To prepare it: '
    f'{tfds_source.preparation(wanted, folders[0])}. If it is elsewhere, say where: '
    '--config.data.data_dir=FOLDER'
  )
