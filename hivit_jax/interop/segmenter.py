"""Segmenters in mmsegmentation's layout: `backbone.*`, `decode_head.*`, `auxiliary_head.*`.

Names as in `files.StateDict` lack the first prefix.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

CLASSIFIER = 'decode_head.conv_seg.weight'  # by which a segmenter is recognised
_HEADS = ('decode_head.', 'auxiliary_head.')
_COUNTER = 'num_batches_tracked'


def arguments(
  shape: Mapping[str, tuple[int, ...]], encoder: Mapping[str, Any], size: tuple[int, int] | None
) -> dict[str, Any]:
  """Those of `segment_hivit_*`.

  Args:
    shape: of every parameter.
    encoder: what is inferred of the encoder, `image_size` that of its position embedding.
    size: (height, width) of the crops; None: the square that the bias tables are for.
  """
  classes, channels, *_ = shape[CLASSIFIER]
  table = next((s for name, s in shape.items() if name.endswith('relative_position_bias_table')), 0)
  side = math.isqrt(table[0]) if table else 0
  if size is None and table and side * side == table[0]:
    size = (8 * (side + 1), 8 * (side + 1))
  second = shape.get('auxiliary_head.conv_seg.weight')
  return {
    **encoder,
    'position_image_size': encoder['image_size'],
    'image_size': size or encoder['image_size'],
    'num_classes': classes,
    'head_channels': channels,
    'auxiliary_channels': second[1] if second else 0,
  }


def official(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The names of mmsegmentation, and the counters of its BatchNorms, at zero."""
  named = {}
  for name, value in arrays.items():
    named[name if name.startswith(_HEADS) else f'backbone.{name}'] = value
    if name.endswith('.running_var'):
      named[name.replace('running_var', _COUNTER)] = np.zeros((), np.int64)
  return named
