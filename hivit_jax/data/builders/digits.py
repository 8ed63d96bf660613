"""`digits`: the 8x8 handwritten digits that scikit-learn carries."""

import gzip
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from hivit_jax.data.builders.packages import package_file
from hivit_jax.data.builders.sharded import ShardedBuilder, SplitContent

_TEST_EVERY = 5


class Digits(ShardedBuilder, skip_registration=True):
  """1797 greyscale images of 8x8 pixels; the last fifth of each class is the test split.

  The file lists the digits writer by writer, so the test digits are mostly by other hands.
  """

  name = 'digits'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return self._image_classification(
      description='Handwritten digits of UCI, as scikit-learn carries them, scaled to 0..255.',
      homepage='https://archive.ics.uci.edu/dataset/80',
      image=tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
      label=tfds.features.ClassLabel(num_classes=10),
    )

  def _contents(self) -> dict[str, SplitContent]:
    with gzip.open(package_file('sklearn', 'datasets/data/digits.csv.gz'), 'rt') as file:
      table = np.loadtxt(file, delimiter=',', dtype=np.int64)
    images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = table[:, -1]
    split_of = np.full(len(labels), 'train', dtype=object)
    for label in range(10):
      members = np.flatnonzero(labels == label)
      split_of[members[len(members) - len(members) // _TEST_EVERY :]] = 'test'
    contents = {}
    for split in ('train', 'test'):
      contents[split] = SplitContent.of(
        [
          {'image': _png(images[i]), 'label': int(labels[i]), 'file_name': f'digit_{i:04d}.png'}
          for i in np.flatnonzero(split_of == split)
        ]
      )
    return contents


def _png(image: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()
