"""Detections of a set on the host: pasted into their images, and measured as on COCO."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hivit_jax.data import coco, masks
from hivit_jax.data.detection_transforms import scene
from hivit_jax.tasks.evaluators import Metrics


def of_batch(found: Mapping[str, np.ndarray]) -> np.ndarray:
  """Detections of the images of a batch, as in COCO's files but for the image's id.

  Args:
    found: the fields of `mask_rcnn.Detections`, `size` (B, 2) of the images that the model saw and
      `original` (B, 2) of the images as they are.

  Returns:
    (B,) lists of dicts: `bbox` (left, top, width, height), `score`, `category_id` and
    `segmentation`, run lengths.
  """
  images = np.empty(len(found['valid']), object)
  for i in range(len(images)):
    height, width = (int(side) for side in found['original'][i])
    scale = found['original'][i] / found['size'][i]
    boxes = found['boxes'][i] * np.tile(scale[::-1], 2)
    images[i] = [
      {
        'category_id': int(found['labels'][i, slot]),
        'score': float(found['scores'][i, slot]),
        'bbox': _left_top_width_height(boxes[slot]),
        'segmentation': coco.encode(
          masks.paste(found['masks'][i, slot], boxes[slot], (height, width)) >= 0.5
        ),
      }
      for slot in np.flatnonzero(found['valid'][i])
    ]
  return images


class Measured:
  """`(detections, index) -> metrics` for `Collected`: COCO's numbers for boxes and masks.

  Metrics are box_ap, mask_ap50, ...: see `coco.METRICS`. Those that there is nothing to measure
  for, such as of large objects where there are none, are left out.
  """

  def __init__(self, source: Any, channels: int = 3):
    """Reads nothing yet; what has been read of an example is kept.

    Args:
      source: the examples, see `detection_transforms.scene`.
      channels: of their images.
    """
    self._source, self._channels, self._known = source, channels, {}

  def __call__(self, detections: np.ndarray, index: np.ndarray) -> Metrics:
    metrics = {}
    groundtruth = self.groundtruth(index)
    for kind, other in (('box', 'segmentation'), ('mask', 'bbox')):
      found = [
        {'image_id': int(image), **{key: value for key, value in own.items() if key != other}}
        for image, owns in zip(index, detections, strict=True)
        for own in owns
      ]
      values, _ = coco.evaluate(groundtruth, found, kind)
      metrics |= {f'{kind}_{key}': value for key, value in values.items() if value >= 0}
    return metrics

  def groundtruth(self, index: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """`images`, `annotations` and `categories` of some examples, as in COCO's files."""
    for i in map(int, index):
      if i not in self._known:
        self._known[i] = self._objects(i)
    sizes = {i: self._known[i][0] for i in map(int, index)}
    annotations = [own for i in sizes for own in self._known[i][1]]
    for number, annotation in enumerate(annotations, 1):  # 0 would count as not found
      annotation['id'] = number
    labels = {own['category_id'] for own in annotations}
    names = self._source.class_names
    labels |= set(range(len(names)))
    return {
      'images': [{'id': i, 'height': size[0], 'width': size[1]} for i, size in sizes.items()],
      'annotations': annotations,
      'categories': [
        {'id': i, 'name': names[i] if i < len(names) else str(i)} for i in sorted(labels)
      ],
    }

  def _objects(self, i: int) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    example = self._source[i]
    own = scene(example, self._channels)
    areas = example['objects'].get('area', own.masks.sum(axis=(1, 2)))
    return own.size, [
      {
        'image_id': i,
        'category_id': int(label),
        'bbox': _left_top_width_height(box),
        'area': float(area),
        'iscrowd': int(crowd),
        'segmentation': coco.encode(mask),
      }
      for label, box, area, crowd, mask in zip(
        own.labels, own.boxes, areas, own.crowd, own.masks, strict=True
      )
    ]


def _left_top_width_height(box: np.ndarray) -> list[float]:
  x1, y1, x2, y2 = map(float, box)
  return [x1, y1, x2 - x1, y2 - y1]
