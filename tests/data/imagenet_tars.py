"""Small tar files in the layout of ImageNet's official ones, of real JPEGs."""

import dataclasses
import io
import tarfile
from pathlib import Path

from PIL import Image

from hivit_jax.data.builders import imagenet_files
from hivit_jax.data.builders.packages import package_file


@dataclasses.dataclass(frozen=True)
class Tars:
  """The two tar files; and for each split, file name -> (label, JPEG bytes)."""

  train_tar: Path
  val_tar: Path
  train: dict[str, tuple[int, bytes]]
  validation: dict[str, tuple[int, bytes]]


def write_tars(folder: Path, classes: int = 3, per_class: int = 4, validation: int = 5) -> Tars:
  """Writes both tars; the validation images lie in another order than that of their numbers."""
  with Image.open(package_file('skimage', 'data/chelsea.png')) as photo:
    photo = photo.convert('RGB')

  def jpeg(number: int) -> bytes:
    x, y = 7 * number % 400, 11 * number % 250
    buffer = io.BytesIO()
    photo.crop((x, y, x + 40, y + 32 + number % 8)).save(buffer, 'JPEG')
    return buffer.getvalue()

  synsets = imagenet_files.synsets()
  train, val = {}, {}
  train_tar, val_tar = folder / 'ILSVRC2012_img_train.tar', folder / 'ILSVRC2012_img_val.tar'
  with tarfile.open(train_tar, 'w') as outer:
    for step in range(classes):
      label = 7 * step  # the labels of the classes that are there have gaps
      buffer = io.BytesIO()
      with tarfile.open(fileobj=buffer, mode='w') as inner:
        for number in range(per_class):
          name = f'{synsets[label]}_{number * 13 + 2}.JPEG'
          train[name] = (label, jpeg(len(train)))
          _add(inner, name, train[name][1])
      _add(outer, f'{synsets[label]}.tar', buffer.getvalue())
  truth = [synsets.index(name) for name in VALIDATION_SYNSETS]
  with tarfile.open(val_tar, 'w') as tar:
    for number in range(validation, 0, -1):
      name = f'ILSVRC2012_val_{number:08d}.JPEG'
      val[name] = (truth[number - 1] if number <= len(truth) else -1, jpeg(1000 + number))
      _add(tar, name, val[name][1])
  return Tars(train_tar, val_tar, train, val)


# The first lines of ILSVRC2012's ground truth.
VALIDATION_SYNSETS = ('n01751748', 'n09193705', 'n02105855', 'n04263257', 'n03125729')


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))
