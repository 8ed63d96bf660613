"""What the host does for an image of a detector, stage by stage, beside bare decoding.

Photographs of COCO's usual size with as many objects as COCO has on average go through the
augmentation of the published recipe, one after the other in one thread. Times are CPU time.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hivit_jax.data import coco, scenes
from hivit_jax.data import detection_transforms as transforms
from hivit_jax.data.order import generator
from hivit_jax.tasks.detect import DetectTask
from hivit_jax.tools.photographs import photo_files

SIZE = (480, 640)  # height and width, the most frequent ones in COCO
OBJECTS = 7  # of an image: COCO has 7.3
CORNERS = 24  # of a polygon
SIDES = (24, 240)  # pixels of an object
GPUS = 8
# Images that a GPU is fed with: an assumption, of 4 TFLOP an image at 120 TFLOP/s.
GPU_IMAGES_PER_SECOND = 30
STAGES = {
  'decode': 'decode the JPEG (bare)',
  'rasterise': 'masks from polygons',
  'geometry': 'flip, resize, crop',
  'arrays': 'crops of masks, padding',
}


def measure(images: int = 64) -> dict[str, Any]:
  """Measures the stages for so many images.

  Returns:
    `ms`, median milliseconds of each of `STAGES`; `ms_per_image`, the mean of all of them together;
    `cores`, how many of them `gpus` need that take `gpu_images_per_second` each; and what was
    measured.

  Raises:
    UserError: scikit-image, which has the photographs, is not installed.
  """
  files = photo_files((SIZE[1], SIZE[0]))
  rng = generator(0, 0)
  task = DetectTask((0.5,) * 3, (0.5,) * 3, num_classes=80)
  transform: Any = task.input(train=True)
  times: dict[str, list[float]] = {stage: [] for stage in STAGES}
  for i in range(images + 1):
    polygons, boxes = _objects(rng)
    clock = time.thread_time()

    def lap(stage: str) -> None:
      nonlocal clock
      now = time.thread_time()
      times[stage].append(1e3 * (now - clock))
      clock = now

    picture = scenes.pixels({'image': files[i % len(files)]})
    lap('decode')
    bitmaps = np.stack([coco.decode(polygon, SIZE) for polygon in polygons])
    lap('rasterise')
    labels, crowd = np.zeros(OBJECTS, np.int32), np.zeros(OBJECTS, bool)
    scene = scenes.Scene(picture, boxes, labels, bitmaps, crowd)
    augmented = transform.augmentation.draw(SIZE, rng.random(transforms.DRAWS))(scene)
    lap('geometry')
    transforms.to_arrays(augmented, _canvas(augmented.size), transform.slots)
    lap('arrays')
  ms = {stage: own[1:] for stage, own in times.items()}  # the first one warms up
  total = sum(statistics.fmean(own) for own in ms.values())
  return {
    'ms': {stage: statistics.median(own) for stage, own in ms.items()},
    'ms_per_image': total,
    'images': images,
    'size': list(SIZE),
    'objects': OBJECTS,
    'gpus': GPUS,
    'gpu_images_per_second': GPU_IMAGES_PER_SECOND,
    'cores': total / 1e3 * GPUS * GPU_IMAGES_PER_SECOND,
  }


def format_report(report: dict[str, Any]) -> str:
  """Returns the result of `measure` as a few lines for a person."""
  height, width = report['size']
  lines = [
    f'Detection: JPEG {width}x{height} with {report["objects"]} objects, the published '
    f'augmentation; CPU time of one thread, medians of {report["images"]} images',
    f'{"ms per image":28}',
  ]
  lines += [f'  {title:26}{report["ms"][stage]:10.1f}' for stage, title in STAGES.items()]
  lines.append(f'  {"all, mean":26}{report["ms_per_image"]:10.1f}')
  lines.append(
    f'{report["gpus"]} GPUs at {report["gpu_images_per_second"]} images/s each (assumed) need '
    f'{report["cores"]:.0f} such cores'
  )
  return '\n'.join(lines)


def _objects(rng: np.random.Generator) -> tuple[list[list[list[float]]], np.ndarray]:
  """Ellipses as polygons, and their boxes."""
  angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
  polygons, boxes = [], []
  for _ in range(OBJECTS):
    across, down = rng.uniform(*SIDES, 2)
    left, top = rng.uniform(0, SIZE[1] - across), rng.uniform(0, SIZE[0] - down)
    x = left + across * (1 + np.cos(angles)) / 2
    y = top + down * (1 + np.sin(angles)) / 2
    polygons.append([np.stack([x, y], axis=1).ravel().tolist()])
    boxes.append((left, top, left + across, top + down))
  return polygons, np.array(boxes, np.float32)


def _canvas(size: Sequence[int]) -> tuple[int, int]:
  height, width = (-(-side // 128) * 128 for side in size)
  return height, width
