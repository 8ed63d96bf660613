"""Segmenters in mmsegmentation's layout: `backbone.*`, `decode_head.*`, `auxiliary_head.*`.

Names as in `files.StateDict` lack the first prefix.
"""

import math
from collections.abc import Mapping
from typing import Any

CLASSIFIER = 'decode_head.conv_seg.weight'  # by which a segmenter is recognised
HEADS = ('neck.', 'decode_head.', 'auxiliary_head.')


def arguments(
  shape: Mapping[str, tuple[int, ...]], encoder: Mapping[str, Any], size: tuple[int, int] | None
) -> dict[str, Any]:
  """Those of `segment_*`.

  Args:
    shape: of every parameter.
    encoder: what is inferred of the encoder, `image_size` that of its position embedding.
    size: (height, width) of the crops; None: the square that HiViT's bias tables are for, or
      that of the position embedding.
  """
  classes, channels, *_ = shape[CLASSIFIER]
  found = {**encoder, 'num_classes': classes}
  if 'absolute_pos_embed' in shape:  # HiViT
    found['position_image_size'] = encoder['image_size']
    tables = [s for name, s in shape.items() if name.endswith('relative_position_bias_table')]
    if size is None and tables:
      side = math.isqrt(tables[0][0])
      if side * side == tables[0][0]:
        size = (8 * (side + 1), 8 * (side + 1))
  if size:
    found['image_size'] = size
  levels = [level for level in (1, 2, 3, 4) if f'decode_head.norm{level}.running_mean' in shape]
  if levels:
    return found | {'linear_levels': tuple(levels)}
  second = shape.get('auxiliary_head.conv_seg.weight')
  return found | {'head_channels': channels, 'auxiliary_channels': second[1] if second else 0}
