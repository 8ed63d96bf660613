"""Finds the images of ImageNet 2012, in the official tar files or in folders; opens none."""

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from hivit_jax.errors import UserError

_VALIDATION_NAME = re.compile(r'ILSVRC2012_val_(\d{8})\.JPEG')
_IMAGE_SUFFIXES = ('.jpeg', '.jpg')


def _packaged_lines(name: str) -> list[str]:
  """Reads a list that tensorflow-datasets carries (not importing its builder, which needs TF)."""
  folder = resources.files('tensorflow_datasets') / 'datasets' / 'imagenet2012'
  return (folder / name).read_text().split()


def synsets() -> list[str]:
  """Returns the 1000 classes in the order of their labels, which is the sorted one."""
  return _packaged_lines('labels.txt')


class ImageFiles(Sequence):
  """Images in one tar file (with their offsets) or below one folder, read on demand.

  Attributes:
    names: file name of each image, without folders.
  """

  def __init__(
    self, root: Path, paths: list[str], labels: list[int], spans: list[tuple[int, int]] | None
  ):
    """Args: the tar or folder, path of each image in it, labels, and (offset, size) in the tar."""
    self.names = [path.rsplit('/', 1)[-1] for path in paths]
    self._root = root
    self._paths = paths
    self._labels = np.array(labels, np.int32)
    self._spans = None if spans is None else np.array(spans, np.int64).reshape(-1, 2)
    self._tar = None if spans is None else os.open(root, os.O_RDONLY)

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict:
    if self._spans is not None and self._tar is not None:
      offset, size = self._spans[index]
      image = os.pread(self._tar, size, offset)
      if len(image) != size:
        raise UserError(f'{self._root} ends in {self.names[index]}: it changed or was truncated')
    else:
      image = (self._root / self._paths[index]).read_bytes()
    return {'image': image, 'label': int(self._labels[index]), 'file_name': self.names[index]}

  def missing_classes(self) -> list[str]:
    """Returns the classes without any image."""
    present = set(np.unique(self._labels).tolist())
    return [name for label, name in enumerate(synsets()) if label not in present]

  def num_bytes(self) -> int:
    """Returns the size of all images; in folders, estimated from a thousand of them."""
    if self._spans is not None:
      return int(self._spans[:, 1].sum())
    some = self._paths[:: max(1, len(self) // 1000)]
    sizes = [os.stat(self._root / path).st_size for path in some]
    return sum(sizes) * len(self) // max(1, len(some))


def train_tar(path: Path) -> ImageFiles:
  """Lists ILSVRC2012_img_train.tar: a tar of 1000 tars, one a class.

  Raises:
    UserError: if it is not such a file, or ends too early.
  """
  label_of = {name: label for label, name in enumerate(synsets())}
  paths: list[str] = []
  labels: list[int] = []
  spans: list[tuple[int, int]] = []
  with _whole_tar(path, paths) as outer:
    for member in _members(outer):
      synset, suffix = os.path.splitext(os.path.basename(member.name))
      if suffix != '.tar' or synset not in label_of:
        raise UserError(
          f'{path} holds {member.name}; the official train file holds one tar per class, such as '
          'n01440764.tar (for extracted images: --source_dir)'
        )
      with tarfile.open(fileobj=outer.extractfile(member), mode='r:') as inner:
        for image in _members(inner):
          paths.append(image.name)
          labels.append(label_of[synset])
          spans.append((member.offset_data + image.offset_data, image.size))
  return ImageFiles(path, paths, labels, spans)


def validation_tar(path: Path) -> ImageFiles:
  """Lists ILSVRC2012_img_val.tar, which holds the images alone; TFDS carries their labels.

  Raises:
    UserError: if it is not such a file, or ends too early.
  """
  truth = _ValidationLabels()
  paths: list[str] = []
  labels: list[int] = []
  spans: list[tuple[int, int]] = []
  with _whole_tar(path, paths) as tar:
    for image in _members(tar):
      paths.append(image.name)
      labels.append(truth.of(image.name, path))
      spans.append((image.offset_data, image.size))
  return ImageFiles(path, paths, labels, spans)


def train_folder(folder: Path) -> ImageFiles:
  """Lists `<folder>/<synset>/*.JPEG`."""
  return ImageFiles(folder, *_list_synset_folders(folder), None)


def validation_folder(folder: Path) -> ImageFiles:
  """Lists `<folder>/<synset>/*.JPEG`, or the 50 000 images side by side in `<folder>`.

  Raises:
    UserError: if a file lies in the folder of another class than the ground truth says.
  """
  truth = _ValidationLabels()
  flat = sorted(name for name in os.listdir(folder) if name.lower().endswith(_IMAGE_SUFFIXES))
  if flat:
    return ImageFiles(folder, flat, [truth.of(name, folder) for name in flat], None)
  paths, labels = _list_synset_folders(folder)
  for path, label in zip(paths, labels, strict=True):
    if _VALIDATION_NAME.search(path) and truth.of(path, folder) != label:
      raise UserError(
        f'{folder / path} is in the wrong class: it belongs to {synsets()[truth.of(path, folder)]};'
        ' sort the validation images again, or use --val_tar'
      )
  return ImageFiles(folder, paths, labels, None)


class _ValidationLabels:
  """The ground truth of the validation images, by the number in their names."""

  def __init__(self):
    label_of = {name: label for label, name in enumerate(synsets())}
    self._labels = [label_of[name] for name in _packaged_lines('validation_labels.txt')]

  def of(self, name: str, where: Path) -> int:
    match = _VALIDATION_NAME.search(name)
    number = int(match[1]) if match else 0
    if not 1 <= number <= len(self._labels):
      raise UserError(
        f'{where} holds {name}; the validation images are called ILSVRC2012_val_00000001.JPEG to '
        f'ILSVRC2012_val_{len(self._labels):08d}.JPEG'
      )
    return self._labels[number - 1]


def _list_synset_folders(folder: Path) -> tuple[list[str], list[int]]:
  label_of = {name: label for label, name in enumerate(synsets())}
  found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
  strange = [name for name in found if name not in label_of and not name.startswith('.')]
  if strange or not found:
    what = f'holds the folder {strange[0]}' if strange else 'holds no folders'
    raise UserError(
      f'{folder} {what}; expected one folder per class, such as n01440764 (other data sets need no '
      'preparation: use folder:/path/to/root)'
    )
  paths: list[str] = []
  labels: list[int] = []
  for name in found:
    files = sorted(
      entry.name
      for entry in os.scandir(folder / name)
      if entry.name.lower().endswith(_IMAGE_SUFFIXES) and not entry.name.startswith('.')
    )
    paths += [f'{name}/{file}' for file in files]
    labels += [label_of[name]] * len(files)
  return paths, labels


@contextlib.contextmanager
def _whole_tar(path: Path, found: Sequence[str]) -> Iterator[tarfile.TarFile]:
  """A tar to be listed to its end; UserError if that comes too early, after the images `found`."""
  try:
    tar = tarfile.open(path, 'r:')  # noqa: SIM115
  except FileNotFoundError:
    raise UserError(f'{path} does not exist') from None
  except (OSError, tarfile.TarError) as error:
    raise UserError(f'{path} cannot be read as a tar file: {error}') from None
  with tar, path.open('rb') as file:
    try:
      yield tar
      # tarfile takes a file that ends inside a header, or between two members, for complete.
      file.seek(tar.offset)
      if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError('no end mark')
    except tarfile.TarError as error:
      last = f', the last one {found[-1]}' if found else ''
      raise UserError(
        f'{path} is damaged or truncated ({error}): it ends after '
        f'{path.stat().st_size / 1e9:.3f} GB and {len(found)} images{last}; download it again'
      ) from None


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
  """Yields the files in a tar; raises `TarError` where it is damaged."""
  for member in tar:
    if member.isfile() and not os.path.basename(member.name).startswith('.'):
      yield member
