"""Images with objects in a folder, described in COCO's JSON format."""

import operator
import os
import re
from collections.abc import Iterable

import numpy as np

from hivit_jax.data import class_lists, coco_files
from hivit_jax.data.sources import splits
from hivit_jax.data.sources.folder import folder_names
from hivit_jax.errors import UserError

LAYOUT = (
  '<root>/annotations/instances_<split>.json, and images in <root>/<split>, <root>/images or <root>'
)
_INSTANCES = re.compile(r'(?:instances_)?(.+)\.json')
_BESIDE = '_annotations.coco.json'  # in the folder of the images, as Roboflow exports them


class CocoSource:
  """The images of one split, in a fixed shuffled order: that of a hash of their file names.

  Attributes:
    name: `coco:` and the root as the user gave it.
    split: the split as the user gave it.
    class_names: names of the categories, in the order of their ids.
    category_ids: their ids.
    palette: (classes, 3) uint8, some colours.
    scenes: (n, 3) int32, see `base.Source`.
  """

  def __init__(self, root: str, split: str):
    """Reads the annotations and lists the images; opens none.

    Args:
      root: folder with the files that `find_files` finds; `~` is understood.
      split: in the grammar of `splits.parse_split`.

    Raises:
      UserError: there are no such files, one is not in COCO's format, or images are missing.
    """
    self.name, self.split = f'coco:{root}', split
    self._root = os.path.abspath(os.path.expanduser(root))
    with splits.readable(self._root):
      files = find_files(self._root)
    if not files:
      raise UserError(f'{self._root} holds no annotations; expected {LAYOUT}')
    opened: dict[str, _Split] = {}

    def size(name: str) -> int:
      if name not in opened:
        opened[name] = _Split(self._root, name, files[name])
      return len(opened[name].order)

    parts = splits.parse_split(self.name, split, files, size)
    self._parts = [(opened[name], opened[name].order[start:stop]) for name, start, stop in parts]
    self._ends = np.cumsum([len(order) for _, order in self._parts])
    first = self._parts[0][0]
    self.class_names = first.annotations.class_names
    self.category_ids = first.annotations.category_ids
    for other in opened.values():
      if other.annotations.class_names != self.class_names:
        raise UserError(f'{other.path} has other categories than {first.path}')
    self.palette = class_lists.distinct_colours(len(self.class_names) + 1)[1:]  # without black
    self.scenes = np.concatenate([own.annotations.scenes[order] for own, order in self._parts])

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self.scenes)

  def _find(self, index: int) -> tuple['_Split', int]:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f'{self.name}/{self.split} has {len(self)} examples, asked for {index}')
    part = int(np.searchsorted(self._ends, index, side='right'))
    own, order = self._parts[part]
    return own, int(order[index - (self._ends[part - 1] if part else 0)])

  def __getitem__(self, index: int) -> dict:
    """Returns `image` (the bytes of the file), `image_id`, `size` and `objects`."""
    own, place = self._find(index)
    with open(own.image(place), 'rb') as file:
      return {'image': file.read(), **own.annotations.of_image(place)}

  def example_name(self, index: int) -> str:
    """Returns the path of the file."""
    own, place = self._find(index)
    return own.image(place)


class _Split:
  """A file of annotations, and the folder of its images."""

  def __init__(self, root: str, name: str, path: str):
    self.path = path
    self.annotations = coco_files.read(path)
    files = self.annotations.files
    stem = os.path.basename(path).removeprefix('instances_').removesuffix('.json')
    folders = [os.path.dirname(path)] if path.endswith(_BESIDE) else []
    folders += [os.path.join(root, *inside) for inside in _image_folders(stem, name)]
    there = {folder: coco_files.files_below(folder, files) for folder in folders}
    self._folder = max(folders, key=lambda folder: len(there[folder]))  # the first of the best
    where = ' or '.join(folders) if not there[self._folder] else self._folder
    coco_files.check_files(path, files, where, there[self._folder])
    self.order = splits.hashed_order(os.fsencode(file) for file in files)

  def image(self, place: int) -> str:
    return os.path.join(self._folder, self.annotations.files[place])


def _image_folders(stem: str, name: str) -> Iterable[tuple[str, ...]]:
  for own in dict.fromkeys((stem, name)):
    yield from ((own,), ('images', own))
  yield from (('images',), ())


def find_files(root: str) -> dict[str, str]:
  """Finds the annotations in a folder: split -> path.

  They are `annotations/instances_SPLIT.json` or, if there are none of these,
  `annotations/SPLIT.json`; or `SPLIT/_annotations.coco.json`. A year at the end of the split, as in
  train2017, is left out where no two splits differ by it.
  """
  folder = os.path.join(root, 'annotations')
  names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
  names = [name for name in names if name.endswith('.json') and not name.startswith('.')]
  names = [name for name in names if name.startswith('instances_')] or names
  found = {name: os.path.join(folder, name) for name in names}
  full = {match[1]: found[name] for name in found if (match := _INSTANCES.fullmatch(name))}
  if not full and os.path.isdir(root):
    beside = {name: os.path.join(root, name, _BESIDE) for name in folder_names(root)}
    full = {name: path for name, path in beside.items() if os.path.exists(path)}
  short = [re.sub(r'(?<=[a-z])20\d\d$', '', name) for name in full]
  return {
    own if short.count(own) == 1 else name: path
    for own, (name, path) in zip(short, full.items(), strict=True)
  }
