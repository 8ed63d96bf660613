"""Detectors in mmdetection's layout: `backbone.*`, `neck.*`, `rpn_head.*`, `roi_head.*`.

Names as in `files.StateDict` lack the first prefix.
"""

from collections.abc import Mapping
from typing import Any

# By which a detector is recognised, and one of three box heads.
CLASSIFIER = 'roi_head.bbox_head.fc_cls.weight'
CASCADE = 'roi_head.bbox_head.0.fc_cls.weight'
HEADS = ('neck.', 'rpn_head.', 'roi_head.')
GUESSED = ('window_size', 'global_blocks')  # Swin's tables show its windows


def arguments(
  shape: Mapping[str, tuple[int, ...]], encoder: Mapping[str, Any], size: tuple[int, int] | None
) -> dict[str, Any]:
  """Those of `detect_*`, without `window_size`. Blocks that attend globally: as published.

  Args:
    shape: of every parameter.
    encoder: what is inferred of the encoder, `image_size` that of its position embedding.
    size: (height, width) of the images; None: that of the position embedding.
  """
  cascade = CASCADE in shape
  classes, hidden = shape[CASCADE if cascade else CLASSIFIER]
  found = {
    **encoder,
    'image_size': size or encoder['image_size'],
    'num_classes': classes - 1,
    'neck_channels': shape['neck.fpn_convs.0.conv.weight'][0],
    'hidden': hidden,
    'cascade': cascade,
  }
  if not {'pos_embed', 'absolute_pos_embed'} & shape.keys():  # Swin
    return found
  if 'depth' in encoder:  # ViT
    depth = encoder['depth']
    step = max(1, depth // 4)
  else:
    depth = encoder['depths'][-1]
    step = max(5, depth // 4)
  return found | {
    'global_blocks': tuple(range(step - 1, depth, step)) or (depth - 1,),
    'position_image_size': encoder['image_size'],
  }
