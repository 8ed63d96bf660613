"""A source in memory and its transforms, which worker processes of loaders import: soon done."""

import io
import threading

import numpy as np
from PIL import Image

from hivit_jax.data.decode import decode_image


def encode(index: int) -> bytes:
  buffer = io.BytesIO()
  Image.new('RGB', (8, 8), (index % 256, index // 256, 7)).save(buffer, 'PNG')
  return buffer.getvalue()


class MemorySource:
  """Images whose colour is their index; some broken, some gone."""

  name, split, class_names, num_classes = 'memory', 'train', ('thing',), 1

  def __init__(self, length: int, broken=(), gone=()):
    self.files = [encode(index) for index in range(length)]
    for index in broken:
      self.files[index] = b'no image'
    self.gone = set(gone)
    self.reads = []

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict:
    self.reads.append(index)
    if index in self.gone:
      raise FileNotFoundError(2, 'No such file or directory', self.example_name(index))
    return {'image': self.files[index], 'label': index}

  def example_name(self, index: int) -> str:
    return f'thing/{index}.png'


def stamp(example: dict, rng: np.random.Generator) -> dict:
  """Keeps the colour, which is the index, and shows the generator in one corner."""
  array = np.array(decode_image(example['image']))
  array[0, 0] = rng.integers(0, 256, 3)
  return {'image': array, 'label': np.int32(example['label'])}


def fail_on_30(example: dict, rng: np.random.Generator) -> dict:
  row = stamp(example, rng)
  if example['label'] == 30:
    error = LookupError('no such colour')
    error.lock = threading.Lock()  # Cannot be pickled.
    raise error
  return row
