"""Images in a tree of folders: `<root>/<split>/<class>/**/<image>`, or `<root>/<split>/<image>`."""

import functools
import logging
import operator
import os
from collections.abc import Sequence

import numpy as np

from hivit_jax.data.sources import splits
from hivit_jax.errors import UserError

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
  *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff'),
  *('.ppm', '.pgm', '.pbm', '.jp2', '.avif', '.npy', '.npz'),
)
LAYOUT = '<root>/<split>/<class>/*.jpg, for example <root>/train/cat/1.jpg'


class FolderSource:
  """The images of one split of a folder tree, in a fixed shuffled order.

  A label is the index of the class folder in sorted order. The classes are those of `train` where
  there is such a split, so that labels agree between splits even when another split lacks a class.
  A split without class folders has the images that lie in it, with the label -1. The order is that
  of a hash of the path below the root: any slice is a random subset.

  Attributes:
    name: `folder:` and the root as the user gave it.
    split: the split as the user gave it.
    class_names: names of the class folders, sorted; empty where there are none.
  """

  def __init__(self, root: str, split: str):
    """Lists the files; opens none.

    Args:
      root: folder that holds the splits; `~` is understood.
      split: in the grammar of `splits.parse_split`.

    Raises:
      UserError: if the tree is not laid out as expected, a split or class is empty, or a folder
        cannot be read.
    """
    self.name = f'folder:{root}'
    self.split = split
    self._root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(self._root):
      raise UserError(f'{self._root} is not a folder; expected {LAYOUT}')
    with splits.readable(self._root):
      self._open(split)

  def _open(self, split: str) -> None:
    split_names = folder_names(self._root)
    if not split_names:
      loose = _images(self._root)
      found = f' but {len(loose)} images, such as {loose[0]}' if loose else ''
      raise UserError(f'{self._root} holds no split folders{found}; expected {LAYOUT}')
    listed: dict[str, tuple[list[bytes], np.ndarray]] = {}

    def size(name: str) -> int:
      if name not in listed:
        listed[name] = self._list(name)
      return len(listed[name][0])

    self.class_names: tuple[str, ...] = ()
    self._reference = 'train' if 'train' in split_names else ''
    if self._reference:
      self.class_names = tuple(folder_names(os.path.join(self._root, self._reference)))
    layout = f'; the layout is {LAYOUT}'
    parts = splits.parse_split(self.name, split, split_names, size, layout)
    paths = [path for name, start, stop in parts for path in listed[name][0][start:stop]]
    self._labels = np.concatenate([listed[name][1][start:stop] for name, start, stop in parts])
    # One blob and its offsets, not a list of strings: a million paths are pickled to every worker
    # in milliseconds, and take no memory beyond their characters.
    self._blob = b''.join(paths)
    self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def _list(self, split_name: str) -> tuple[list[bytes], np.ndarray]:
    """Returns the paths below the root and the labels of one split, in hashed order."""
    folder = os.path.join(self._root, split_name)
    classes, loose = folder_names(folder), _images(folder)
    if not classes:
      if not loose:
        raise UserError(f'{folder} holds neither class folders nor images; expected {LAYOUT}')
      encoded = [os.fsencode(f'{split_name}/{name}') for name in loose]
      order = splits.hashed_order(encoded)
      return [encoded[i] for i in order], np.full(len(loose), -1, np.int32)
    if loose:
      _warn_of_loose(folder, len(loose), loose[0])
    if not self.class_names:
      self.class_names, self._reference = tuple(classes), split_name
    label_of = {name: label for label, name in enumerate(self.class_names)}
    unknown = [name for name in classes if name not in label_of]
    if unknown:
      raise UserError(
        f'{folder} has {_some(unknown)} that {self._reference} does not have, so labels '
        f'would not agree; add every class to {self._reference}'
      )
    paths: list[str] = []
    labels: list[np.ndarray] = []
    empty = []
    for name in classes:
      before = len(paths)
      collect_images(os.path.join(folder, name), f'{split_name}/{name}/', paths)
      labels.append(np.full(len(paths) - before, label_of[name], np.int32))
      if len(paths) == before:
        empty.append(name)
    if empty:
      raise UserError(
        f'{folder}: no images in {_some(empty)} (looked for {", ".join(IMAGE_SUFFIXES)} '
        'in the folder and those below it); remove the folder or fill it'
      )
    encoded = [os.fsencode(path) for path in paths]
    order = splits.hashed_order(encoded)
    return [encoded[i] for i in order], np.concatenate(labels)[order]

  def _path(self, index: int) -> str:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f'{self.name}/{self.split} has {len(self)} examples, asked for {index}')
    start = self._ends[index - 1] if index else 0
    return os.path.join(self._root, os.fsdecode(self._blob[start : self._ends[index]]))

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> dict:
    """Returns `image` (the bytes of the file) and `label` (int, -1 without class folders)."""
    with open(self._path(index), 'rb') as file:
      return {'image': file.read(), 'label': int(self._labels[index])}

  def example_name(self, index: int) -> str:
    """Returns the path of the file."""
    return self._path(index)


def image_files(folder: str) -> list[str]:
  """Returns the paths of the images in `folder` and below it, sorted.

  Raises:
    UserError: There are none, or a folder cannot be read.
  """
  paths: list[str] = []
  try:
    collect_images(folder, os.path.join(folder, ''), paths)
  except OSError as error:
    raise UserError(f'cannot read {error.filename}: {error.strerror}') from error
  if not paths:
    raise UserError(f'no images in {folder} (looked for {", ".join(IMAGE_SUFFIXES)})')
  return sorted(paths)


@functools.cache  # training and evaluation may have parts of the same split
def _warn_of_loose(folder: str, count: int, example: str) -> None:
  _log.warning(
    '%s: %d images beside the class folders are left out, because they have no class, such as %s',
    folder, count, example,
  )  # fmt: skip


def folder_names(folder: str) -> list[str]:
  """Returns the names of the visible folders in `folder`, sorted; symbolic links count."""
  with os.scandir(folder) as entries:
    return sorted(e.name for e in entries if not e.name.startswith('.') and e.is_dir())


def _images(folder: str) -> list[str]:
  """Returns the names of the images that lie in `folder` itself, sorted."""
  with os.scandir(folder) as entries:
    return sorted(e.name for e in entries if _is_image(e.name) and not e.is_dir())


def _is_image(name: str) -> bool:
  return not name.startswith('.') and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def collect_images(folder: str, prefix: str, paths: list[str]) -> None:
  """Appends the images in `folder` and below, as `prefix` + path from `folder`."""
  with os.scandir(folder) as entries:
    for entry in entries:
      if _is_image(entry.name):
        paths.append(prefix + entry.name)
      # Links to folders are not followed here: a link upwards would never end.
      elif not entry.name.startswith('.') and entry.is_dir(follow_symlinks=False):
        collect_images(entry.path, f'{prefix}{entry.name}/', paths)


def _some(names: Sequence[str]) -> str:
  shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
  return f'{len(names)} class folder{"s" if len(names) > 1 else ""} ({shown})'
