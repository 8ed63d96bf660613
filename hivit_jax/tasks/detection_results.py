"""Detections of a set on the host: pasted into their images, and measured as on COCO."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hivit_jax.data import coco, masks
from hivit_jax.data.scenes import scene

Object = dict[str, Any]  # found or true, as in COCO's files but for the ids of image and class

# How the results files write numbers; what is measured is rounded so, too.
_SCORE_DIGITS, _PIXEL_DIGITS = 6, 3


def of_batch(found: Mapping[str, np.ndarray]) -> np.ndarray:
  """Detections of the images of a batch.

  Args:
    found: the fields of `mask_rcnn.Detections`, `size` (B, 2) of the images that the model saw and
      `original` (B, 2) of the images as they are.

  Returns:
    (B,) lists of objects: `bbox` (left, top, width, height), `score`, `category_id`, which is the
    label, and `segmentation`, run lengths.
  """
  images = np.empty(len(found['valid']), object)
  for i in range(len(images)):
    height, width = (int(side) for side in found['original'][i])
    scale = found['original'][i] / found['size'][i]
    boxes = found['boxes'][i] * np.tile(scale[::-1], 2)
    images[i] = [
      {
        'category_id': int(found['labels'][i, slot]),
        'score': round(float(found['scores'][i, slot]), _SCORE_DIGITS),
        'bbox': _left_top_width_height(boxes[slot]),
        'segmentation': coco.encode(
          masks.paste(found['masks'][i, slot], boxes[slot], (height, width)) >= 0.5
        ),
      }
      for slot in np.flatnonzero(found['valid'][i])
    ]
  return images


class Report(NamedTuple):
  """COCO's measures of one set; -1 where there is nothing to measure.

  Attributes:
    metrics: box_ap, mask_ap50, ...: see `coco.METRICS`.
    categories: of each class that there is: its name, number of objects, `box_ap` and `mask_ap`.
  """

  metrics: dict[str, float]
  categories: list[dict[str, Any]]

  @property
  def text(self) -> str:
    """Two tables, in percent: the twelve numbers, and the classes, the best first."""

    def percent(value: float) -> str:
      return f'{100 * value:8.2f}' if value >= 0 else '       -'

    lines = [f'{"":12}     box    mask']
    for name in coco.METRICS:
      own = [percent(self.metrics[f'{kind}_{name}']) for kind in coco.KINDS]
      lines.append(f'{name.replace("_", " "):12}{"".join(own)}')
    width = max([12, *(len(row['class']) for row in self.categories)])
    lines += ['', f'{"class":{width}}  box AP mask AP objects']
    for row in sorted(self.categories, key=lambda row: -row['box_ap']):
      own = [percent(row[f'{kind}_ap']) for kind in coco.KINDS]
      lines.append(f'{row["class"]:{width}}{"".join(own)}{row["objects"]:8d}')
    return '\n'.join(lines)


class Truth:
  """The objects of a source; what has been read of an example is kept."""

  def __init__(self, source: Any, channels: int = 3):
    """Reads nothing yet.

    Args:
      source: the examples, see `scenes.scene`.
      channels: of their images.
    """
    self._source, self._channels, self._known = source, channels, {}

  def measure(self, detections: np.ndarray, index: np.ndarray) -> Report:
    """COCO's numbers for boxes and masks.

    Args:
      detections: (n,) lists of objects, see `of_batch`.
      index: (n,) of the examples that they were found in; others do not count.
    """
    metrics, of_category = {}, {}
    groundtruth = self.groundtruth(index)
    for kind in coco.KINDS:
      found = rows(detections, index.tolist(), None, kind)
      values, of_category[kind] = coco.evaluate(groundtruth, found, kind)
      metrics |= {f'{kind}_{key}': value for key, value in values.items()}
    counts = np.bincount(
      [a['category_id'] for a in groundtruth['annotations'] if not a['iscrowd']],
      minlength=len(groundtruth['categories']),
    )
    categories = [
      {
        'class': category['name'],
        'objects': int(counts[category['id']]),
        **{f'{kind}_ap': of_category[kind][category['id']] for kind in coco.KINDS},
      }
      for category in groundtruth['categories']
    ]
    return Report(metrics, categories)

  def groundtruth(self, index: np.ndarray) -> dict[str, list[Object]]:
    """`images`, `annotations` and `categories` of some examples, as in COCO's files."""
    annotations, images = [], []
    for i in map(int, index):
      (height, width), objects, _ = self.of_example(i)
      images.append({'id': i, 'height': height, 'width': width})
      annotations += [{**own, 'image_id': i} for own in objects]
    for number, annotation in enumerate(annotations, 1):  # 0 would count as not found
      annotation['id'] = number
    labels = {own['category_id'] for own in annotations}
    names = self._source.class_names
    labels |= set(range(len(names)))
    return {
      'images': images,
      'annotations': annotations,
      'categories': [
        {'id': i, 'name': names[i] if i < len(names) else str(i)} for i in sorted(labels)
      ],
    }

  def of_example(self, i: int) -> tuple[tuple[int, int], list[Object], int]:
    """Height and width of an image, its objects, and its id in results files."""
    if i not in self._known:
      self._known[i] = self._read(i)
    return self._known[i]

  def _read(self, i: int) -> tuple[tuple[int, int], list[Object], int]:
    example = self._source[i]
    objects = example['objects']
    if 'size' in example and 'masks' in objects:  # no need to decode the image
      size = int(example['size'][0]), int(example['size'][1])
      counts = [coco.run_lengths(mask, size) for mask in objects['masks']]
      areas = [coco.area(own, size) for own in counts]
      found = [{'size': list(size), 'counts': own.decode('ascii')} for own in counts]
    else:
      own = scene(example, self._channels)
      size, areas = own.size, own.masks.sum(axis=(1, 2))
      found = [coco.encode(mask) for mask in own.masks]
    count = len(objects['classes'])
    crowd = objects.get('crowd', np.zeros(count))
    boxes = np.asarray(objects['boxes'], np.float32).reshape(-1, 4)
    columns = (objects['classes'], boxes, objects.get('area', areas), crowd, found)
    annotations = [
      {
        'category_id': int(label),
        'bbox': _left_top_width_height(box),
        'area': float(area),
        'iscrowd': int(is_crowd),
        'segmentation': mask,
      }
      for label, box, area, is_crowd, mask in zip(*columns, strict=True)
    ]
    return size, annotations, int(example.get('image_id', i))


def rows(
  detections: Iterable[list[Object]],
  image_ids: Sequence[int],
  category_ids: Sequence[int] | None,
  kind: str,
) -> list[Object]:
  """Detections as results files have them.

  Args:
    detections: of each image.
    image_ids: of these.
    category_ids: by label; None: they are the labels.
    kind: 'box' or 'mask'. Those of masks have no `bbox`: their areas would be those of the boxes.
  """
  other = {'box': 'segmentation', 'mask': 'bbox'}[kind]
  known = range(1 << 31) if category_ids is None else category_ids
  return [
    {
      'image_id': image,
      **{key: value for key, value in own.items() if key != other},
      'category_id': known[own['category_id']],
    }
    for image, owns in zip(image_ids, detections, strict=True)
    for own in owns
  ]


def _left_top_width_height(box: np.ndarray) -> list[float]:
  x1, y1, x2, y2 = map(float, box)
  return [round(value, _PIXEL_DIGITS) for value in (x1, y1, x2 - x1, y2 - y1)]
