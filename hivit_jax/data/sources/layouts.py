"""Where images, their label maps and the names of classes lie in folders for segmentation."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable

import numpy as np

from hivit_jax.data.class_lists import CITYSCAPES, VOC, ClassList, distinct_colours
from hivit_jax.data.sources.folder import collect_images, folder_names
from hivit_jax.errors import UserError

Pair = tuple[str, str]  # paths of an image and its label map, below the root

_IGNORED = 255
_ADE20K_CLASSES = 'objectInfo150.txt'
# Which of the 34 numbers in Cityscapes' labelIds files are classes, in the order of these.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
_SHOWN = 3  # files in a message


@dataclasses.dataclass(frozen=True)
class Layout:
  """What is known of a data set in folders.

  Attributes:
    splits: names of the splits.
    pairs: split -> the images with their label maps, in any order; UserError if one lacks the
      other.
    classes: names and colours.
    table: (256,) uint8, the label of each stored number; None: label maps are taken as they are.
  """

  splits: tuple[str, ...]
  pairs: Callable[[str], list[Pair]]
  classes: ClassList
  table: np.ndarray | None = None


def is_paired(root: str) -> bool:
  """Whether there are label maps beside the images in a folder."""
  return any(_has(root, names) for names in _LAYOUTS)


def layout_of(root: str) -> Layout:
  """Finds out how the images and label maps in a folder are laid out.

  | layout | images | label maps | splits |
  |---|---|---|---|
  | ours, ADE20K | images/SPLIT/** | annotations/SPLIT/**, same name, .png | folders |
  | PASCAL VOC | JPEGImages | SegmentationClass | ImageSets/Segmentation/SPLIT.txt |
  | Cityscapes | leftImg8bit/SPLIT/CITY | gtFine/SPLIT/CITY, labelTrainIds or labelIds | folders |

  Raises:
    UserError: there is no list of classes, or no split.
  """
  make = next(make for names, make in _LAYOUTS.items() if _has(root, names))
  layout = make(root)
  if not layout.splits:
    raise UserError(f'{root} holds no splits; {_EXPECTED[make]}')
  return layout


def read_classes(root: str) -> ClassList:
  """Reads the list of classes of a data set.

  It is `classes.txt`, with a name a line; or `classes.json`, with a list of names, or `names` and
  `palette`, an RGB colour each; or ADE20K's objectInfo150.txt.

  Raises:
    UserError: there is none, or it is not well formed.
  """
  text = os.path.join(root, 'classes.txt')
  if os.path.exists(text):
    with open(text, encoding='utf-8') as file:
      return _checked(text, [line.strip() for line in file.read().strip().splitlines()], None)
  path = os.path.join(root, 'classes.json')
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      try:
        listed = json.load(file)
      except ValueError as error:
        raise UserError(f'{path} is not JSON: {error}') from None
    if isinstance(listed, dict):
      return _checked(path, listed.get('names'), listed.get('palette'))
    return _checked(path, listed, None)
  if os.path.exists(os.path.join(root, _ADE20K_CLASSES)):
    from hivit_jax.data.class_lists import ADE20K

    return ADE20K
  raise UserError(
    f'{root} holds no classes.txt (a name a line, in the order of the labels) and no classes.json '
    '({"names": [...], "palette": [[red, green, blue], ...]})'
  )


def _checked(path: str, names: object, palette: object) -> ClassList:
  if not isinstance(names, list) or not names or not all(n and isinstance(n, str) for n in names):
    raise UserError(f'{path} has to hold a name for each class')
  double = next((name for i, name in enumerate(names) if name in names[:i]), None)
  if double is not None:
    raise UserError(f'{path} has the class {double!r} twice')
  if palette is None:
    return ClassList(tuple(names), distinct_colours(len(names)))
  try:
    colours = np.array(palette)
    fits = colours.shape == (len(names), 3) and ((colours >= 0) & (colours < 256)).all()
  except (TypeError, ValueError):
    fits = False
  if not fits:
    raise UserError(f'{path}: "palette" has to hold [red, green, blue], 0 to 255, for each class')
  return ClassList(tuple(names), colours.astype(np.uint8))


def matched(
  where: str, images: Iterable[str], labels: Iterable[str], key: Callable[[str], str]
) -> list[tuple[str, str]]:
  """Pairs images with label maps.

  Args:
    where: they are, for messages.
    images: paths.
    labels: paths.
    key: path -> what an image and its label map have in common.

  Raises:
    UserError: one lacks the other, or two have the same key.
  """
  found: list[dict[str, str]] = []
  for paths in (images, labels):
    keyed: dict[str, str] = {}
    for path in paths:
      other = keyed.setdefault(key(path), path)
      if other != path:
        raise UserError(f'{where} holds both {other} and {path}; their names have to differ')
    found.append(keyed)
  by_image, by_label = found
  for some, others, what, lacks in (
    (by_image, by_label, 'images', 'label map'),
    (by_label, by_image, 'label maps', 'image'),
  ):
    alone = sorted(some[key] for key in some.keys() - others.keys())
    if alone:
      raise UserError(
        f'{where}: {len(alone)} of {len(some)} {what} have no {lacks}: {_some(alone)}; add what is '
        'missing, or move them away'
      )
  return [(path, by_label[key]) for key, path in by_image.items()]


def _folders(root: str) -> Layout:
  """images/SPLIT/**, annotations/SPLIT/**.png."""

  def pairs(split: str) -> list[Pair]:
    def files(kind: str) -> list[str]:
      return _listed(root, os.path.join(kind, split))

    def key(path: str) -> str:
      return os.path.splitext(path.split(os.sep, 2)[2])[0]

    labels = files('annotations')
    other = [path for path in labels if not path.lower().endswith('.png')]
    if other:
      raise UserError(f'{root}: label maps have to be PNG files, not {_some(other)}')
    return matched(root, files('images'), labels, key)

  return Layout(_folder_names(root, 'images'), pairs, read_classes(root))


def _voc(root: str) -> Layout:
  lists = os.path.join(root, 'ImageSets', 'Segmentation')
  names = sorted(os.listdir(lists)) if os.path.isdir(lists) else []
  splits = tuple(name[:-4] for name in names if name.endswith('.txt') and name[0] != '.')

  def pairs(split: str) -> list[Pair]:
    path = os.path.join(lists, f'{split}.txt')
    with open(path, encoding='utf-8') as file:
      numbers = file.read().split()
    listed = [
      (os.path.join('JPEGImages', f'{n}.jpg'), os.path.join('SegmentationClass', f'{n}.png'))
      for n in numbers
    ]
    there = {
      folder: set(os.listdir(os.path.join(root, folder)))
      for folder in ('JPEGImages', 'SegmentationClass')
    }
    lacking = [
      file
      for pair in listed
      for file in pair
      if os.path.basename(file) not in there[os.path.dirname(file)]
    ]
    if lacking:
      raise UserError(
        f'{path} lists {len(listed)} images, and {len(lacking)} files of these are missing in '
        f'{root}: {_some(lacking)}'
      )
    return listed

  return Layout(splits, pairs, VOC)


def _cityscapes(root: str) -> Layout:
  splits = _folder_names(root, 'leftImg8bit')
  train_ids = ('_gtFine_labelTrainIds.png', None)
  ids = np.full(256, _IGNORED, np.uint8)
  ids[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
  label_ids = ('_gtFine_labelIds.png', ids)
  # One form in all of the data set, so that train and validation agree.
  files = [path for split in splits for path in _listed(root, os.path.join('gtFine', split))]
  ending, table = train_ids if any(path.endswith(train_ids[0]) for path in files) else label_ids

  def pairs(split: str) -> list[Pair]:
    def having(end: str, kind: str) -> list[str]:
      listed = _listed(root, os.path.join(kind, split))
      return [path for path in listed if path.endswith(end)]

    def key(path: str) -> str:
      for end in ('_leftImg8bit.png', ending):
        path = path.removesuffix(end)
      return path.split(os.sep, 1)[1]

    images, labels = having('_leftImg8bit.png', 'leftImg8bit'), having(ending, 'gtFine')
    return matched(root, images, labels, key)

  return Layout(splits, pairs, CITYSCAPES, table)


_LAYOUTS = {
  ('images', 'annotations'): _folders,
  ('JPEGImages', 'SegmentationClass'): _voc,
  ('leftImg8bit', 'gtFine'): _cityscapes,
}
_EXPECTED = {
  _folders: 'expected images/<split>/**/*.jpg and annotations/<split>/**/*.png',
  _voc: 'expected ImageSets/Segmentation/<split>.txt',
  _cityscapes: 'expected leftImg8bit/<split>/<city>/*_leftImg8bit.png',
}


def _has(root: str, names: Iterable[str]) -> bool:
  return all(os.path.isdir(os.path.join(root, name)) for name in names)


def _folder_names(root: str, kind: str) -> tuple[str, ...]:
  return tuple(folder_names(os.path.join(root, kind)))


def _listed(root: str, folder: str) -> list[str]:
  """Paths of the images in a folder and below it, relative to the root; none if there is none."""
  paths: list[str] = []
  if os.path.isdir(os.path.join(root, folder)):
    collect_images(os.path.join(root, folder), os.path.join(folder, ''), paths)
  return paths


def _some(paths: list[str]) -> str:
  return ', '.join(paths[:_SHOWN]) + (', ...' if len(paths) > _SHOWN else '')
