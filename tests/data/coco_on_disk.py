"""Small data sets in COCO's format: real JPEGs, polygons, a crowd as run lengths."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hivit_jax.data.class_lists import COCO, COCO_IDS

SIZES = ((48, 64), (64, 48), (40, 40))  # height and width of the images, one after the other
CATEGORIES = [{'id': i, 'name': n} for i, n in zip(COCO_IDS, COCO.names, strict=True)]


def photo(number: int, size: tuple[int, int]) -> bytes:
  pixels = np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'JPEG')
  return file.getvalue()


def square(left: float, top: float, side: float) -> list[list[float]]:
  right, bottom = left + side, top + side
  return [[left, top, right, top, right, bottom, left, bottom]]


def annotated(count: int, first: int = 0) -> dict[str, Any]:
  """The content of a file: image i has a square, i % 3 = 1 a crowd, too, i % 4 = 3 nothing."""
  images, annotations = [], []
  for i in range(first, first + count):
    height, width = SIZES[i % 3]
    image = {'id': 1000 + i, 'file_name': f'{i:012d}.jpg', 'height': height, 'width': width}
    images.append(image)
    own = {'image_id': image['id'], 'iscrowd': 0}
    if i % 4 != 3:
      box = [4.0, 6.0, 20.0 + i % 5, 20.0 + i % 5]
      own |= {'bbox': box, 'segmentation': square(*box[:3]), 'area': box[2] ** 2}
      annotations.append({**own, 'id': 10 * i + 1, 'category_id': COCO_IDS[(7 * i) % 80]})
    if i % 3 == 1:
      counts = [height * 2, height * 10, height * (width - 12)]  # ten columns
      crowd = {'size': [height, width], 'counts': counts}
      own |= {'bbox': [2, 0, 10, height], 'segmentation': crowd, 'area': 10 * height}
      annotations.append({**own, 'id': 10 * i + 2, 'category_id': 1, 'iscrowd': 1})
  return {'images': images, 'annotations': annotations, 'categories': CATEGORIES[::-1]}


def files_of(content: dict[str, Any], folder: str, annotations: str) -> dict[str, bytes]:
  """Path -> bytes of a split: its JPEGs in a folder, and its annotations."""
  files = {
    f'{folder}/{image["file_name"]}': photo(image['id'], (image['height'], image['width']))
    for image in content['images']
  }
  return files | {annotations: json.dumps(content).encode()}


def official(train: int = 5, val: int = 3) -> dict[str, bytes]:
  """Path -> bytes of a small COCO."""
  return {
    **files_of(annotated(train), 'train2017', 'annotations/instances_train2017.json'),
    **files_of(annotated(val, 100), 'val2017', 'annotations/instances_val2017.json'),
    'annotations/captions_val2017.json': b'{}',
  }


def zips(root: Path, files: dict[str, bytes]) -> dict[str, Path]:
  """The three official files, by the flags that take them."""
  root.mkdir(exist_ok=True)
  named = {'train_zip': 'train2017', 'val_zip': 'val2017', 'annotations_zip': 'annotations'}
  for flag, folder in named.items():
    with zipfile.ZipFile(root / f'{flag}.zip', 'w') as archive:
      archive.writestr(f'{folder}/', b'')
      for name, data in files.items():
        if name.startswith(f'{folder}/'):
          archive.writestr(name, data)
  return {flag: root / f'{flag}.zip' for flag in named}
