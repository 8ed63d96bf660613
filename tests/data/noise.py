"""A source of random pictures of many sizes, with everything that an example may have."""

import io

import numpy as np
from PIL import Image


def png(array: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, 'PNG')
  return buffer.getvalue()


class Noise:
  """Blocks of random colours; a label map that is the red channel; the boxes of some blocks.

  Args:
    length: number of examples.
    broken: indices of those that are no images.
    sizes: (height, width) of each; None: random.
  """

  name, split, class_names, num_classes = 'noise', 'train', ('thing',), 1

  def __init__(self, length: int, broken=(), sizes=None):
    self.examples = []
    for i in range(length):
      rng = np.random.default_rng(i)
      height, width = rng.integers(20, 60, 2) if sizes is None else sizes[i]
      blocks = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
      pixels = np.kron(blocks, np.ones((4, 4, 1), np.uint8))
      example = {'image': png(pixels), 'label': i, 'segmentation': png(pixels[..., 0])}
      corner = rng.integers(0, [pixels.shape[1] // 4, pixels.shape[0] // 4], (3, 2)) * 4
      boxes = np.concatenate([corner, corner + 4], 1)
      example['objects'] = {'boxes': boxes, 'classes': np.arange(3)}
      self.examples.append(example)
    for i in broken:
      self.examples[i]['image'] = b'no image'

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> dict:
    return self.examples[index]

  def example_name(self, index: int) -> str:
    return f'noise/{index}.png'
