"""Tiny data sets for segmentation, laid out exactly as the official ones."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from hivit_jax.data.class_lists import distinct_colours

ADE20K_SPLITS = {'training': ('train', 5), 'validation': ('val', 3)}


def encoded(pixels: np.ndarray, kind: str = 'PNG', palette: bool = False) -> bytes:
  image = Image.fromarray(pixels)
  if palette:
    image.putpalette(distinct_colours(256).tobytes())
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def photo(number: int, size: tuple[int, int] = (12, 18), kind: str = 'JPEG') -> bytes:
  return encoded(np.full((*size, 3), number, np.uint8), kind)


def put(root: Path, files: dict[str, bytes]) -> Path:
  for name, data in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
  return root


def ade20k_files() -> dict[str, bytes]:
  """Label maps have 0, the number of the image, and 150."""
  files = {
    'objectInfo150.txt': b'Idx\tRatio\tTrain\tVal\tStuff\tName\n',
    'sceneCategories.txt': b'',
  }
  for split, (short, count) in ADE20K_SPLITS.items():
    for i in range(1, count + 1):
      stem = f'{split}/ADE_{short}_{i:08d}'
      labels = np.full((12, 18), i, np.uint8)
      labels[:2], labels[-1] = 0, 150
      files[f'images/{stem}.jpg'] = photo(i)
      files[f'annotations/{stem}.png'] = encoded(labels)
  return files


def ade20k_zip(path: Path, files: dict[str, bytes] | None = None) -> Path:
  """With entries for folders and what macOS adds, as the official file has."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('ADEChallengeData2016/', b'')
    archive.writestr('ADEChallengeData2016/images/training/', b'')
    for name, data in (files or ade20k_files()).items():
      archive.writestr(f'ADEChallengeData2016/{name}', data)
    archive.writestr('ADEChallengeData2016/images/training/.DS_Store', b'x')
  return path


def voc(root: Path) -> Path:
  files = {}
  for i in range(6):
    labels = np.full((12, 18), i, np.uint8)
    labels[0] = 255
    files[f'JPEGImages/2007_{i:06d}.jpg'] = photo(i)
    files[f'SegmentationClass/2007_{i:06d}.png'] = encoded(labels, palette=True)
  files['JPEGImages/2007_000099.jpg'] = photo(9)  # most images of VOC have no label map
  lists = {'train': range(4), 'val': range(4, 6), 'trainval': range(6)}
  for split, numbers in lists.items():
    lines = ''.join(f'2007_{i:06d}\n' for i in numbers)
    files[f'ImageSets/Segmentation/{split}.txt'] = lines.encode()
  return put(root, files)


def cityscapes(root: Path, train_ids: bool) -> Path:
  """Label maps have class 1, class 18 and something that is ignored, as either kind of number."""
  files = {}
  for split, city, count in (('train', 'aachen', 3), ('train', 'bremen', 2), ('val', 'munster', 2)):
    for i in range(count):
      stem = f'{split}/{city}/{city}_{i:06d}_000019'
      ids = np.full((8, 16), 8, np.uint8)
      ids[1], ids[2] = 33, 4
      files[f'leftImg8bit/{stem}_leftImg8bit.png'] = photo(i, (8, 16), 'PNG')
      files[f'gtFine/{stem}_gtFine_labelIds.png'] = encoded(ids)
      files[f'gtFine/{stem}_gtFine_instanceIds.png'] = encoded(ids.astype(np.uint16))
      files[f'gtFine/{stem}_gtFine_color.png'] = photo(i, (8, 16), 'PNG')
      files[f'gtFine/{stem}_gtFine_polygons.json'] = b'{}'
      if train_ids:
        trained = np.ones((8, 16), np.uint8)
        trained[1], trained[2] = 18, 255
        files[f'gtFine/{stem}_gtFine_labelTrainIds.png'] = encoded(trained)
  return put(root, files)
