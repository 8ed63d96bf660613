"""Masks as run lengths, and average precision as on COCO: the only place that knows pycocotools."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The twelve numbers in the order of pycocotools. AP is the mean over IoUs of .5, .55, ..., .95 and
# over categories; AR the recall with so many detections an image.
METRICS = (
  *('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large'),
  *('ar_1', 'ar_10', 'ar_100', 'ar_small', 'ar_medium', 'ar_large'),
)
KINDS = {'box': 'bbox', 'mask': 'segm'}  # of ours -> pycocotools' names

Annotation = dict[str, Any]


def _run_lengths() -> Any:  # its own annotations of types are wrong
  from pycocotools import mask

  return mask


def _coco() -> Any:
  try:  # the same numbers, several times as fast
    from faster_coco_eval import COCO, COCOeval_faster  # pyright: ignore[reportMissingImports]
  except ImportError:
    pass
  else:
    return COCO, COCOeval_faster
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  return COCO, COCOeval


def encode(mask: np.ndarray) -> dict[str, Any]:
  """(height, width) of 0 and 1 -> `size` and `counts`, compressed run lengths for JSON."""
  run_lengths = _run_lengths()
  found = run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))
  return {'size': [int(n) for n in found['size']], 'counts': found['counts'].decode('ascii')}


def run_lengths(segmentation: Any, size: tuple[int, int]) -> bytes:
  """The compressed run lengths of an object's mask, parts of it merged.

  Args:
    segmentation: list of polygons [x0, y0, x1, y1, ...] in pixels, or run lengths, compressed (text
      or bytes, alone or as `counts`) or not (a list of numbers), as in COCO's files.
    size: (height, width) of the image.
  """
  if isinstance(segmentation, str | bytes):
    segmentation = {'counts': segmentation}
  if isinstance(segmentation, Mapping):
    counts = segmentation['counts']
    if isinstance(counts, str | bytes):
      return counts.encode('ascii') if isinstance(counts, str) else counts
    return _run_lengths().frPyObjects({'size': list(size), 'counts': list(counts)}, *size)['counts']
  found = _run_lengths()
  return found.merge(found.frPyObjects(list(segmentation), *size))['counts']


def decode(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
  """(height, width) uint8 of 0 and 1; `run_lengths` describes the arguments.

  Raises:
    ValueError: the run lengths are for another size, or damaged.
  """
  counts = run_lengths(segmentation, size)
  return np.ascontiguousarray(_run_lengths().decode({'size': list(size), 'counts': counts}))


def area(counts: bytes, size: tuple[int, int]) -> float:
  """Pixels of a mask given as compressed run lengths."""
  return float(_run_lengths().area({'size': list(size), 'counts': counts}))


def evaluate(
  groundtruth: Mapping[str, Any], detections: Sequence[Annotation], kind: str
) -> tuple[dict[str, float], dict[int, float]]:
  """COCO's measures of detections.

  Args:
    groundtruth: `images`, `annotations` and `categories` as in COCO's files.
    detections: of each an `image_id`, `category_id` and `score`, and for boxes `bbox` (left, top,
      width, height), for masks `segmentation`, run lengths. Those for masks have no `bbox`: sizes
      would be those of the boxes.
    kind: 'box' or 'mask'.

  Returns:
    METRICS -> value in [0, 1], and category id -> AP; -1 where there is nothing to measure.
  """
  COCO, COCOeval = _coco()
  with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
    truth = COCO()
    truth.dataset = {
      **{key: list(value) for key, value in groundtruth.items()},
      'annotations': [dict(annotation) for annotation in groundtruth['annotations']],
    }
    truth.createIndex()
    if not detections:  # which it cannot read
      return _nothing_found(truth)
    found = truth.loadRes([dict(detection) for detection in detections])
    run = COCOeval(truth, found, KINDS[kind])
    run.evaluate()
    run.accumulate()
    run.summarize()
  precision = run.eval['precision'][:, :, :, 0, -1]  # (IoUs, recalls, categories), all sizes
  of_category = {
    int(category): float(own[own > -1].mean()) if (own > -1).any() else -1.0
    for category, own in zip(run.params.catIds, np.moveaxis(precision, 2, 0), strict=True)
  }
  return dict(zip(METRICS, map(float, run.stats[: len(METRICS)]), strict=True)), of_category


def _nothing_found(truth: Any) -> tuple[dict[str, float], dict[int, float]]:
  """Zero for what there is something of, as pycocotools with a detection that fits nothing."""
  counted = [a for a in truth.dataset['annotations'] if not a.get('iscrowd', 0)]
  areas = np.array([a['area'] for a in counted])
  # Its ranges include both ends.
  some = {
    'small': (areas <= 32**2).any(),
    'medium': ((areas >= 32**2) & (areas <= 96**2)).any(),
    'large': (areas >= 96**2).any(),
  }
  measured = {m: bool(some.get(m.rsplit('_', 1)[-1], len(counted))) for m in METRICS}
  of_category = {a['category_id'] for a in counted}
  return (
    {metric: 0.0 if there_is else -1.0 for metric, there_is in measured.items()},
    {int(i): 0.0 if i in of_category else -1.0 for i in sorted(truth.getCatIds())},
  )
