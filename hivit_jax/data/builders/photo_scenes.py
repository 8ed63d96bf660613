"""`photo_scenes`: scenes put together from the photographs of `photo_tiles`, with exact masks."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from hivit_jax.data import class_lists
from hivit_jax.data.builders.packages import package_file
from hivit_jax.data.builders.photo_tiles import PHOTOS, Part, jpeg, split_photo
from hivit_jax.data.builders.sharded import ShardedBuilder, SplitContent
from hivit_jax.data.order import generator

SIDE = 128  # pixels
SCENES = {'train': 2048, 'test': 256}
IGNORED = 255  # class of the pixels at the border of two things
MIN_PIXELS, MIN_VISIBLE = 64, 0.25  # an object shows at least so many pixels and so much of itself
_MAX_OBJECTS = 4
_SIDES = (24, 80)  # pixels, of the square that an object's shape is drawn in
_ZOOM = (1.2, 1.8)  # photographs are enlarged, so that a scene shows a part of a thing
_STREAMS = {'train': 0, 'test': 1 << 32}  # of random numbers: one a scene


@dataclasses.dataclass(frozen=True)
class Scene:
  """A picture and all that is known of it.

  Attributes:
    image: (SIDE, SIDE, 3) uint8.
    classes: (SIDE, SIDE) uint8, index of the photograph that a pixel is from; IGNORED in the two
      pixels around a border.
    instances: (SIDE, SIDE) uint8: i + 1 where object i is seen, also in its border; 0: background.
    boxes: (n, 4) int64, (left, top, right, bottom) of what is seen of each object; right and bottom
      are those of the pixel behind it.
    labels: (n,) int64, the class of each object.
    areas: (n,) int64, the number of pixels seen of each object.
  """

  image: np.ndarray
  classes: np.ndarray
  instances: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  areas: np.ndarray


def draw_scene(
  photos: Sequence[Sequence[Part]], background: int, horse: Image.Image, rng: np.random.Generator
) -> Scene:
  """Draws a scene: a background, and on it one to four objects, each of another photograph.

  Objects overlap each other and the border of the picture. One of which too little would be seen
  is left out, so that now and then there is none.

  Args:
    photos: the parts of each class.
    background: its class.
    horse: a shape, as an image of mode 'L' that is 255 inside.
    rng: source of all that is random.
  """
  image = _region(photos[background], SIDE, rng).copy()
  layers = []  # from the back to the front
  others = np.delete(np.arange(len(photos)), background)
  for label in rng.choice(others, rng.integers(1, _MAX_OBJECTS + 1), replace=False):
    side = int(rng.integers(_SIDES[0], _SIDES[1] + 1))
    shape = _SHAPES[rng.integers(len(_SHAPES))](side, horse, rng)
    pixels = _region(photos[label], side, rng)
    # Its centre is inside.
    left, top = rng.integers(-side // 2, SIDE - side // 2, 2)
    layers.append((int(label), pixels, shape, _window(side, int(left), int(top))))
  # From the front: what covers an object is settled before the object.
  free, kept = np.ones((SIDE, SIDE), bool), []
  for label, pixels, mask, window in reversed(layers):
    whole, seen = mask.sum(), np.zeros((SIDE, SIDE), bool)
    seen[window.scene] = mask[window.own]
    seen &= free
    if seen.sum() >= max(MIN_PIXELS, MIN_VISIBLE * whole):
      kept.append((label, seen))
      free &= ~seen
      own = np.zeros_like(image)
      own[window.scene] = pixels[window.own]
      image[seen] = own[seen]
  kept.reverse()
  return _annotated(image, background, kept)


@dataclasses.dataclass(frozen=True)
class _Window:
  """The part of an object that is inside the picture, in both systems of coordinates."""

  scene: tuple[slice, slice]
  own: tuple[slice, slice]


def _window(side: int, left: int, top: int) -> _Window:
  def overlap(start: int) -> tuple[slice, slice]:
    first, last = max(start, 0), min(start + side, SIDE)
    return slice(first, last), slice(first - start, last - start)

  (rows, own_rows), (columns, own_columns) = overlap(top), overlap(left)
  return _Window((rows, columns), (own_rows, own_columns))


def _annotated(
  image: np.ndarray, background: int, objects: Sequence[tuple[int, np.ndarray]]
) -> Scene:
  instances = np.zeros((SIDE, SIDE), np.uint8)
  boxes = np.zeros((len(objects), 4), np.int64)
  for i, (_, seen) in enumerate(objects):
    instances[seen] = i + 1
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
  labels = np.array([label for label, _ in objects], np.int64)
  classes = np.append(background, labels).astype(np.uint8)[instances]
  for behind, before in (
    (np.s_[:-1], np.s_[1:]),
    (np.s_[:, :-1], np.s_[:, 1:]),
  ):
    differ = instances[behind] != instances[before]
    classes[behind][differ] = classes[before][differ] = IGNORED
  areas = np.bincount(instances.ravel(), minlength=len(objects) + 1)[1:]
  return Scene(image, classes, instances, boxes, labels, areas)


def _region(parts: Sequence[Part], side: int, rng: np.random.Generator) -> np.ndarray:
  """A square part of a photograph, enlarged: (side, side, 3) uint8."""
  part = parts[rng.integers(len(parts))].pixels
  size = min(math.ceil(side / rng.uniform(*_ZOOM)), *part.shape[:2])
  top, left = (int(rng.integers(n - size + 1)) for n in part.shape[:2])
  square = Image.fromarray(part[top : top + size, left : left + size])
  return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def _polar(side: int) -> tuple[np.ndarray, np.ndarray]:
  """Distance from the centre, 1 at the nearest border, and angle of each pixel."""
  x = (np.arange(side) + 0.5) * 2 / side - 1
  return np.hypot(x[:, None], x), np.arctan2(x[:, None], x)


def _ellipse(side: int, horse: Image.Image, rng: np.random.Generator) -> np.ndarray:
  del horse
  radius, angle = _polar(side)
  turned, flatness = angle - rng.uniform(0, math.pi), rng.uniform(0.5, 1)
  return radius * np.hypot(np.cos(turned), np.sin(turned) / flatness) <= 1


def _box(side: int, horse: Image.Image, rng: np.random.Generator) -> np.ndarray:
  del horse
  mask = np.zeros((side, side), bool)
  (top, left), (height, width) = rng.uniform(0, 0.4, 2), rng.uniform(0.6, 1, 2)
  top, left = min(top, 1 - height), min(left, 1 - width)
  mask[
    int(top * side) : int((top + height) * side), int(left * side) : int((left + width) * side)
  ] = True
  return mask


def _polygon(side: int, horse: Image.Image, rng: np.random.Generator) -> np.ndarray:
  del horse
  corners = int(rng.integers(3, 8))
  angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * math.pi / corners
  angles, radii = angles + rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1, corners)
  points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
  image = Image.new('1', (side, side))
  ImageDraw.Draw(image).polygon([tuple(p) for p in (points + 1) * (side - 1) / 2], fill=1)
  return np.asarray(image)


def _blob(side: int, horse: Image.Image, rng: np.random.Generator) -> np.ndarray:
  del horse
  radius, angle = _polar(side)
  waves = sum(
    rng.uniform(0, 0.35 / k) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in range(2, 6)
  )
  return radius <= 0.72 + 0.6 * waves


def _horse(side: int, horse: Image.Image, rng: np.random.Generator) -> np.ndarray:
  image = horse.resize((side, side * horse.height // horse.width), Image.Resampling.BOX)
  mask = np.zeros((side, side), bool)
  mask[: image.height] = np.asarray(image) >= 128
  return mask[:, ::-1] if rng.random() < 0.5 else mask


_SHAPES = (_ellipse, _box, _polygon, _blob, _horse)


class _Scenes(Sequence):
  """The scenes of one split, drawn when they are asked for."""

  def __init__(self, split: str, photos: Sequence[Sequence[Part]], horse: Image.Image):
    self._split, self._photos, self._horse = split, photos, horse
    self.names = [f'{split}_{i:05d}.jpg' for i in range(SCENES[split])]

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> Mapping:
    background, stream = index % len(self._photos), _STREAMS[self._split] + index
    scene = draw_scene(self._photos, background, self._horse, generator(0, stream))
    return {
      'image': jpeg(scene.image),
      'segmentation': _png(scene.classes),
      'instances': _png(scene.instances),
      'objects': {
        'boxes': scene.boxes.astype(np.float32),
        'classes': scene.labels,
        'area': scene.areas,
      },
      'file_name': self.names[index],
    }


class PhotoScenes(ShardedBuilder, skip_registration=True):
  """2048 train and 256 test scenes of 128x128 of 16 photographs, from separate regions of these."""

  name = 'photo_scenes'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    names = list(PHOTOS)
    mask = {'shape': (SIDE, SIDE, 1), 'encoding_format': 'png'}
    return self._described(
      description='Scenes put together from regions of photographs. The class of a pixel tells '
      'which photograph it is from. Train and test scenes are made from separate regions.',
      homepage='https://scikit-image.org/docs/stable/api/skimage.data.html',
      features={
        'image': tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format='jpeg'),
        'segmentation': tfds.features.LabeledImage(labels=names, **mask),
        'instances': tfds.features.Image(**mask),
        'objects': tfds.features.Sequence(
          {
            'boxes': tfds.features.Tensor(shape=(4,), dtype=np.float32),
            'classes': tfds.features.ClassLabel(names=names),
            'area': np.int64,
          }
        ),
      },
      supervised_keys=('image', 'segmentation'),
      palette=class_lists.distinct_colours(len(names)),
    )

  def _contents(self) -> dict[str, SplitContent]:
    photos: dict[str, list[list[Part]]] = {split: [] for split in SCENES}
    for package, path in PHOTOS.values():
      with Image.open(package_file(package, path)) as photo:
        for split, parts in split_photo(photo.convert('RGB')).items():
          photos[split].append(parts)
    with Image.open(package_file('skimage', 'data/horse.png')) as file:
      horse = _silhouette(file)
    contents = {}
    for split, parts in photos.items():
      scenes = _Scenes(split, parts, horse)
      contents[split] = SplitContent(scenes.names, scenes, len(scenes) * 13_000)
    return contents


def _silhouette(image: Image.Image) -> Image.Image:
  """What is dark in a drawing on white, cut to its rectangle: 255 in an image of mode 'L'."""
  white = Image.new('RGBA', image.size, 'white')
  white.alpha_composite(image.convert('RGBA'))
  mask = white.convert('L').point(lambda value: 255 if value < 128 else 0)
  return mask.crop(mask.getbbox())


def _png(labels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(labels).save(buffer, 'PNG')
  return buffer.getvalue()
