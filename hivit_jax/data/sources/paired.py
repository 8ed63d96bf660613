"""Images with label maps in folders."""

import operator
import os

import numpy as np

from hivit_jax.data.decode import BrokenImage, decode_label_map
from hivit_jax.data.sources import splits
from hivit_jax.data.sources.layouts import layout_of
from hivit_jax.errors import UserError


class PairedSource:
  """The images and label maps of one split of a folder, in a fixed shuffled order.

  The order is that of a hash of the image's path below the root: any slice is a random subset.

  Attributes:
    name: `folder:` and the root as the user gave it.
    split: the split as the user gave it.
    class_names: names of the classes, by label.
    palette: (classes, 3) uint8, their colours.
  """

  def __init__(self, root: str, split: str):
    """Lists the files, and opens the first label map only.

    Args:
      root: folder with one of the layouts of `layouts.layout_of`; `~` is understood.
      split: in the grammar of `splits.parse_split`.

    Raises:
      UserError: an image lacks its label map or the other way round, there is no list of classes
        or no such split, label maps hold colours, or a file cannot be read.
    """
    self.name = f'folder:{root}'
    self.split = split
    self._root = os.path.abspath(os.path.expanduser(root))
    with splits.readable(self._root):
      self._open(split)

  def _open(self, split: str) -> None:
    layout = layout_of(self._root)
    self.class_names, self.palette = layout.classes.names, layout.classes.palette
    self._table = layout.table
    listed: dict[str, list[tuple[str, str]]] = {}

    def size(name: str) -> int:
      if name not in listed:
        pairs = layout.pairs(name)
        order = splits.hashed_order(os.fsencode(image) for image, _ in pairs)
        listed[name] = [pairs[i] for i in order]
      return len(listed[name])

    parts = splits.parse_split(self.name, split, layout.splits, size)
    self._pairs = [pair for name, start, stop in parts for pair in listed[name][start:stop]]
    try:
      decode_label_map(self._read(self._pairs[0][1]))
    except BrokenImage as error:
      path = os.path.join(self._root, self._pairs[0][1])
      raise UserError(
        f'{path}: {error}; a label map is a PNG file of one channel, or with a palette, whose '
        'numbers are classes'
      ) from None

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def _pair(self, index: int) -> tuple[str, str]:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f'{self.name}/{self.split} has {len(self)} examples, asked for {index}')
    return self._pairs[index]

  def _read(self, path: str) -> bytes:
    with open(os.path.join(self._root, path), 'rb') as file:
      return file.read()

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, index: int) -> dict:
    """Returns `image` and `segmentation`, the bytes of the files, or integers (H, W)."""
    image, labels = map(self._read, self._pair(index))
    if self._table is None:
      return {'image': image, 'segmentation': labels}
    stored = np.asarray(decode_label_map(labels))
    return {'image': image, 'segmentation': self._table[stored]}

  def example_name(self, index: int) -> str:
    """Returns the paths of the image and of its label map."""
    image, labels = (os.path.join(self._root, path) for path in self._pair(index))
    return f'{image} with {labels}'
