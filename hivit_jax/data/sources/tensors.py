"""Images that TFDS stores as arrays: `tfds.features.Tensor` of (height, width, channels)."""

import dataclasses
import zlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """How an array lies in an example.

  Attributes:
    key: of the feature.
    dtype: of the array.
    shape: of the array; None: known from each example only.
    encoding: 'none', 'bytes' or 'zlib', as TFDS has it.
  """

  key: str
  dtype: np.dtype
  shape: tuple[int | None, ...]
  encoding: str

  @classmethod
  def of(cls, key: str, feature: Any) -> 'StoredArray | None':
    """Of a feature of that name; None unless it is such an image."""
    if not is_image(feature):
      return None
    encoding = feature.to_json_content().encoding or 'none'
    return cls(key, np.dtype(feature.np_dtype), tuple(feature.shape), encoding)

  def read(self, features: Any) -> np.ndarray:
    """Returns the array of an example; `features` is what its proto holds, by key."""
    shape = self.shape
    dynamic = shape.count(None) > 1
    stored = features[f'{self.key}/value' if dynamic else self.key]
    if dynamic:
      shape = tuple(features[f'{self.key}/shape'].int64_list.value)
    if self.encoding == 'none':
      numbers = stored.float_list.value if self.dtype.kind == 'f' else stored.int64_list.value
      array = np.array(numbers, self.dtype)
    else:
      data = stored.bytes_list.value[0]
      array = np.frombuffer(zlib.decompress(data) if self.encoding == 'zlib' else data, self.dtype)
    return array.reshape([-1 if side is None else side for side in shape])


def is_image(feature: Any) -> bool:
  """Whether a feature is an array of three dimensions."""
  if not isinstance(feature, tfds.features.Tensor):
    return False
  shape: Any = feature.shape  # TFDS's annotations do not say
  return len(shape) == 3
