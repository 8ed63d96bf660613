"""Detectors in mmdetection's layout: `backbone.*`, `neck.*`, `rpn_head.*`, `roi_head.*`.

Names as in `files.StateDict` lack the first prefix.
"""

from collections.abc import Mapping
from typing import Any

CLASSIFIER = 'roi_head.bbox_head.fc_cls.weight'  # by which a detector is recognised
HEADS = ('neck.', 'rpn_head.', 'roi_head.')
GUESSED = ('window_size', 'global_blocks')


def arguments(
  shape: Mapping[str, tuple[int, ...]], encoder: Mapping[str, Any], size: tuple[int, int] | None
) -> dict[str, Any]:
  """Those of `detect_hivit_*`. Nothing tells which blocks attend globally: as published.

  Args:
    shape: of every parameter.
    encoder: what is inferred of the encoder, `image_size` that of its position embedding.
    size: (height, width) of the images; None: that of the position embedding.
  """
  classes, hidden = shape[CLASSIFIER]
  depth = encoder['depths'][-1]
  step = max(5, depth // 4)
  return {
    **encoder,
    'global_blocks': tuple(range(step - 1, depth, step)) or (depth - 1,),
    'position_image_size': encoder['image_size'],
    'image_size': size or encoder['image_size'],
    'num_classes': classes - 1,
    'neck_channels': shape['neck.fpn_convs.0.conv.weight'][0],
    'hidden': hidden,
  }
