"""How much of the speed of bare decoding and resizing the input pipeline keeps.

All sides read the same JPEG files from memory with the same number of threads, in turns in one
process. The bare side is PIL alone: decode, crop, bicubic resize. The pipeline is `train_loader`
with the augmentation of MAE pretraining: shuffled order, random crops, flips, arrays, batches. The
supervised pipeline has the classifiers' augmentation instead: smaller crops, and RandAugment. The
segmentation pipeline reads a label map with each photograph; its bare side decodes both and resizes
the same windows.

With another Python that has their packages, pipelines of PyTorch and TensorFlow take turns with
these, see `other_pipelines`.

Images per second *per core* are images per second of CPU time (`time.process_time`: all threads of
the process), so that neither idle cores nor other programs count.
"""

import concurrent.futures
import functools
import io
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from hivit_jax.data import segmentation_transforms
from hivit_jax.data.cores import usable_cores
from hivit_jax.data.loader import train_loader
from hivit_jax.data.order import generator
from hivit_jax.data.transforms import RandomResizedCrop, train_transform
from hivit_jax.tools import (
  bands_data_benchmark,
  detection_data_benchmark,
  large_photo_benchmark,
  pipelines_beside,
)
from hivit_jax.tools.photographs import PHOTO_SIZE, photo_files

BATCH_SIZE = 64
SEGMENTED_BATCH_SIZE = 16  # that of the recipe for crops of 512
GPU_RATE = 5000  # Images/s of a fast GPU in pretraining.
RAND_AUGMENT = 'rand-m9-mstd0.5-inc1'
# Side -> the one it is compared with, and the share of its speed to be kept.
TARGETS = {
  'pipeline': ('bare', 0.85),
  'supervised': ('pipeline', 0.7),
  'segmentation': ('bare_segmentation', 0.5),
}
_TITLES = {
  'bare': 'bare decode + resize',
  'pipeline': 'pipeline',
  'supervised': 'supervised pipeline',
  'bare_segmentation': 'the same, label map too',
  'segmentation': 'segmentation pipeline',
}
_CLASSES = 16


class MemorySource:
  """A few examples, over and over."""

  name, split, class_names, num_classes = 'benchmark', 'train', ('photo',), 1

  def __init__(self, examples: Sequence[dict[str, Any]], length: int):
    self._examples = examples
    self._length = length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._examples[index % len(self._examples)]

  def example_name(self, index: int) -> str:
    return f'{self.name}[{index}]'


def label_map(file: bytes) -> bytes:
  """Returns a label map for a photograph: a class for each level of brightness, as a PNG file."""
  with Image.open(io.BytesIO(file)) as photo:
    blurred = np.asarray(photo.convert('L').filter(ImageFilter.GaussianBlur(8)))
  buffer = io.BytesIO()
  Image.fromarray(blurred // (256 // _CLASSES)).save(buffer, 'PNG')
  return buffer.getvalue()


def measure(
  *,
  images: int = 512,
  repeats: int = 7,
  size: int = 224,
  segmented: int = 512,
  num_threads: int | None = None,
  beside: str | None = None,
) -> dict[str, Any]:
  """Measures bare PIL and the pipelines by turns.

  Args:
    images: Images in a turn; rounded up to whole batches.
    repeats: Turns of each side. Speeds are medians over them.
    size: Side of the output, in pixels.
    segmented: Side of the output of segmentation.
    num_threads: Threads of either side; None for one a usable core.
    beside: A Python with torch, torchvision and tensorflow, whose pipelines are measured, too.

  Returns:
    `bare`, `pipeline`, `supervised`, `bare_segmentation` and `segmentation`, each with
    `images_per_second_per_core` (CPU time) and `images_per_second` (wall clock); those of `TARGETS`
    also with `kept` and `kept_wall`, the share of the other one's speed, as the median over pairs
    of turns, and `target`; those of `pipelines_beside.SIDES` without; and the conditions of the
    measurement.

  Raises:
    UserError: scikit-image, which has the photographs, is not installed.
  """
  files = photo_files()
  images = -(-images // BATCH_SIZE) * BATCH_SIZE
  threads = num_threads or usable_cores()
  labels = [label_map(file) for file in files]
  pairs = [
    {'image': file, 'segmentation': own, 'label': 0}
    for file, own in zip(files, labels, strict=True)
  ]
  source = MemorySource(pairs, images)
  crop, rng = RandomResizedCrop((size, size)), generator(0, 0)
  work = [(files[i % len(files)], crop.box(*PHOTO_SIZE, rng)) for i in range(images)]

  dense = segmentation_transforms.train_transform(
    segmented, _CLASSES, scale=(4 * segmented, segmented)
  )
  windows = [_window(segmented, rng) for _ in range(images)]

  def bare_share(thread: int) -> None:
    for file, box in work[thread::threads]:
      image = Image.open(io.BytesIO(file)).convert('RGB')
      image.crop(box).resize((size, size), Image.Resampling.BICUBIC)

  def bare_segmentation_share(thread: int) -> None:
    for i in range(thread, images, threads):
      out, box = windows[i]
      image = Image.open(io.BytesIO(files[i % len(files)])).convert('RGB')
      image.resize(out, Image.Resampling.BILINEAR, box)
      own = Image.open(io.BytesIO(labels[i % len(files)]))
      own.resize(out, Image.Resampling.NEAREST, box)

  def in_threads(share: Callable[[int], None]) -> None:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      list(pool.map(share, range(threads)))

  def pipeline(transform: Any, batch_size: int = BATCH_SIZE) -> None:
    options: dict[str, Any] = {'num_steps': images // batch_size, 'num_threads': threads}
    with train_loader(source, transform, batch_size=batch_size, seed=0, **options) as loader:
      for _ in loader:
        pass

  pretraining = train_transform(size)
  supervised = train_transform(size, scale=(0.08, 1.0), rand_augment=RAND_AUGMENT)
  sides = {
    'bare': functools.partial(in_threads, bare_share),
    'pipeline': functools.partial(pipeline, pretraining),
    'supervised': functools.partial(pipeline, supervised),
    'bare_segmentation': functools.partial(in_threads, bare_segmentation_share),
    'segmentation': functools.partial(pipeline, dense, SEGMENTED_BATCH_SIZE),
  }
  for run in sides.values():  # Imports, allocations, clock speed.
    run()
  measured = {name: functools.partial(_speeds, run, images) for name, run in sides.items()}
  with pipelines_beside.started(beside, files, threads) as others:
    measured |= {name: functools.partial(other.speeds, images) for name, other in others.items()}
    turns = [{name: speeds() for name, speeds in measured.items()} for _ in range(repeats)]
  report: dict[str, Any] = {}
  for name in measured:
    per_core, wall = _medians(turn[name] for turn in turns)
    report[name] = {'images_per_second_per_core': per_core, 'images_per_second': wall}
  for name, (other, target) in TARGETS.items():
    kept, kept_wall = _medians(
      [speed / reference for speed, reference in zip(turn[name], turn[other], strict=True)]
      for turn in turns
    )
    report[name] |= {'kept': kept, 'kept_wall': kept_wall, 'target': target}
  return report | {
    'threads': threads,
    'images_per_turn': images,
    'turns': repeats,
    'image_size': size,
    'segmented_size': segmented,
    'photo_size': list(PHOTO_SIZE),
    'photo_kilobytes': sum(map(len, files)) / len(files) / 1000,
  }


def format_report(report: dict[str, Any]) -> str:
  """Returns the result of `measure` as a few lines for a person."""
  width, height = report['photo_size']
  lines = [
    f'JPEG {width}x{height}, {report["photo_kilobytes"]:.0f} kB, from memory to '
    f'{report["image_size"]}x{report["image_size"]}, for segmentation to '
    f'{report["segmented_size"]}x{report["segmented_size"]}; {report["threads"]} threads; medians '
    f'of {report["turns"]} turns of {report["images_per_turn"]} images',
    f'{"images/s":24}{"per core (CPU time)":>22}{"wall clock":>14}',
  ]
  for name, title in (_TITLES | pipelines_beside.SIDES).items():
    if name not in report:
      continue
    side = report[name]
    lines.append(
      f'{title:24}{side["images_per_second_per_core"]:22.1f}{side["images_per_second"]:14.1f}'
    )
    if name in TARGETS:
      lines.append(
        f'{"  kept":24}{side["kept"]:22.1%}{side["kept_wall"]:14.1%}   '
        f'(of {TARGETS[name][0].replace("_", " ")}; target: {side["target"]:.0%} per core)'
      )
  rate = report['pipeline']['images_per_second_per_core']
  lines.append(
    f'8 GPUs at {GPU_RATE} images/s each would need {8 * GPU_RATE / rate:.0f} such cores for the '
    'pipeline of pretraining (a projection from one core)'
  )
  return '\n'.join(lines)


def main(
  *,
  as_json: bool = False,
  detected: int = 64,
  banded: int = 64,
  large: int = 24,
  **options: Any,
) -> dict[str, Any]:
  """Measures, prints a table or one JSON object, and returns the numbers.

  Args:
    as_json: Print JSON.
    detected: Images of `detection_data_benchmark`, whose report is under `detection`.
    banded: Images of `bands_data_benchmark`, whose report is under `bands`.
    large: Images of `large_photo_benchmark`, whose report is under `large`.
    **options: Those of `measure`.
  """
  report = measure(**options)
  report['detection'] = detection_data_benchmark.measure(detected)
  report['bands'] = bands_data_benchmark.measure(banded)
  report['large'] = large_photo_benchmark.measure(large)
  print(json.dumps(report) if as_json else format_all(report))
  return report


def format_all(report: dict[str, Any]) -> str:
  """Returns the tables of `main`."""
  tables = (
    format_report(report),
    detection_data_benchmark.format_report(report['detection']),
    bands_data_benchmark.format_report(report['bands']),
    large_photo_benchmark.format_report(report['large']),
  )
  return '\n\n'.join(tables)


def _window(
  side: int, rng: np.random.Generator
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
  """A window as segmentation draws it: (width, height) of the output, and its box in a photo."""
  width, height = PHOTO_SIZE
  ratio = rng.uniform(0.5, 2.0)
  scaled = segmentation_transforms.resized(
    height, width, (int(4 * side * ratio), int(side * ratio))
  )
  h, w = (min(n, side) for n in scaled)
  top, left = (int(rng.integers(n - m + 1)) for n, m in zip(scaled, (h, w), strict=True))
  y, x = height / scaled[0], width / scaled[1]
  box = (left * x, top * y, min((left + w) * x, width), min((top + h) * y, height))
  return (w, h), box


def _speeds(run: Callable[[], None], images: int) -> tuple[float, float]:
  """Images per second of CPU time and of wall-clock time."""
  cpu, wall = time.process_time(), time.perf_counter()
  run()
  return images / (time.process_time() - cpu), images / (time.perf_counter() - wall)


def _medians(rows: Iterable[Sequence[float]]) -> list[float]:
  return [statistics.median(column) for column in zip(*rows, strict=True)]
