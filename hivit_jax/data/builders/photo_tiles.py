"""`photo_tiles`: square tiles of the photographs that scikit-image and scikit-learn carry."""

import dataclasses
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from hivit_jax.data.builders.packages import package_file
from hivit_jax.data.builders.sharded import ShardedBuilder, SplitContent

# Photographs with structure all over. Left out: drawings and text, the second motorcycle (the
# same scene) and `cell` and `clock_motion`, which are nearly empty.
PHOTOS = {
  'astronaut': ('skimage', 'data/astronaut.png'),
  'brick': ('skimage', 'data/brick.png'),
  'camera': ('skimage', 'data/camera.png'),
  'chelsea': ('skimage', 'data/chelsea.png'),
  'china': ('sklearn', 'datasets/images/china.jpg'),
  'coffee': ('skimage', 'data/coffee.png'),
  'coins': ('skimage', 'data/coins.png'),
  'flower': ('sklearn', 'datasets/images/flower.jpg'),
  'grass': ('skimage', 'data/grass.png'),
  'gravel': ('skimage', 'data/gravel.png'),
  'hubble_deep_field': ('skimage', 'data/hubble_deep_field.jpg'),
  'ihc': ('skimage', 'data/ihc.png'),
  'moon': ('skimage', 'data/moon.png'),
  'motorcycle': ('skimage', 'data/motorcycle_left.png'),
  'retina': ('skimage', 'data/retina.jpg'),
  'rocket': ('skimage', 'data/rocket.jpg'),
}
TILE = 96  # pixels a side
TILES_PER_PHOTO = {'train': 320, 'test': 64}
_LONG_SIDE = 512  # larger photographs are reduced to this, so that a tile shows a thing, not a blur
_STEP = 6  # pixels between candidates
_BAND_SHARE, _BAND_PIXELS = 0.24, 112  # width of the test band: a share, and at least so much
_CONTRAST_SHARE = 0.75  # of the candidates: those with the most contrast


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a photograph that one split may see, at the size that tiles are cut at.

  Attributes:
    pixels: (H, W, 3) uint8.
    left: of its first column in the reduced photograph.
  """

  pixels: np.ndarray
  left: int


def split_photo(photo: Image.Image) -> dict[str, list[Part]]:
  """Cuts a photograph into the parts of each split.

  The test part is a vertical band in the middle, the train parts lie beside it. They are cut from
  the original before any resizing, so no pixel has a share in both.

  Args:
    photo: an RGB image, at least 340 pixels wide and 96 high when its long side is at most 512.

  Returns:
    Two parts for `train` and one for `test`.
  """
  scale = min(1.0, _LONG_SIDE / max(photo.size))
  band = round(max(_BAND_SHARE * photo.width, _BAND_PIXELS / scale))
  left = (photo.width - band) // 2
  columns = {'train': ((0, left), (left + band, photo.width)), 'test': ((left, left + band),)}

  def cut(start: int, stop: int) -> Part:
    part = photo.crop((start, 0, stop, photo.height))
    size = (max(TILE, round(part.width * scale)), max(TILE, round(part.height * scale)))
    return Part(np.asarray(part.resize(size, Image.Resampling.BICUBIC)), round(start * scale))

  return {split: [cut(*ends) for ends in listed] for split, listed in columns.items()}


@dataclasses.dataclass(frozen=True)
class Tile:
  """One tile: (96, 96, 3) uint8, and the name of the place that it was cut from."""

  pixels: np.ndarray
  name: str


def cut_tiles(photo: Image.Image, name: str) -> dict[str, list[Tile]]:
  """Cuts the tiles of a photograph.

  Args:
    photo: see `split_photo`.
    name: prefix of the names of the tiles.

  Returns:
    TILES_PER_PHOTO tiles for each of `train` and `test`, overlapping their neighbours.
  """
  tiles = {}
  for split, parts in split_photo(photo).items():
    candidates: list[Tile] = []
    contrasts: list[float] = []
    for part in parts:
      grey = part.pixels.mean(-1, dtype=np.float32)
      for y in range(0, grey.shape[0] - TILE + 1, _STEP):
        for x in range(0, grey.shape[1] - TILE + 1, _STEP):
          window = np.s_[y : y + TILE, x : x + TILE]
          place = f'{name}_x{part.left + x:03d}_y{y:03d}.jpg'
          candidates.append(Tile(part.pixels[window], place))
          contrasts.append(float(grey[window].std()))
    tiles[split] = _choose(candidates, contrasts, TILES_PER_PHOTO[split])
  return tiles


def _choose(candidates: list[Tile], contrasts: list[float], count: int) -> list[Tile]:
  """Returns `count` candidates, evenly spread over those that are not the flattest (sky)."""
  kept = np.argsort(-np.array(contrasts), kind='stable')
  kept = np.sort(kept[: int(len(kept) * _CONTRAST_SHARE)])
  return [candidates[kept[i]] for i in np.linspace(0, len(kept) - 1, count).round().astype(int)]


class PhotoTiles(ShardedBuilder, skip_registration=True):
  """16 photographs (the classes), 5120 train and 1024 test tiles of 96x96, as JPEG."""

  name = 'photo_tiles'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return self._image_classification(
      description='Tiles of photographs; the label tells which photograph. Train and test tiles '
      'come from separate regions.',
      homepage='https://scikit-image.org/docs/stable/api/skimage.data.html',
      image=tfds.features.Image(shape=(TILE, TILE, 3), encoding_format='jpeg'),
      label=tfds.features.ClassLabel(names=list(PHOTOS)),
    )

  def _contents(self) -> dict[str, SplitContent]:
    examples: dict[str, list[dict]] = {'train': [], 'test': []}
    for label, (name, (package, path)) in enumerate(PHOTOS.items()):
      with Image.open(package_file(package, path)) as photo:
        tiles = cut_tiles(photo.convert('RGB'), name)
      for split, cut in tiles.items():
        examples[split] += [
          {'image': jpeg(tile.pixels), 'label': label, 'file_name': tile.name} for tile in cut
        ]
    return {split: SplitContent.of(listed) for split, listed in examples.items()}


def jpeg(pixels: np.ndarray) -> bytes:
  """Encodes (H, W, 3) uint8 with hardly any loss."""
  buffer = io.BytesIO()
  # 4:4:4 and quality 95: no visible loss, a third of the size of PNG and half its decoding time.
  Image.fromarray(pixels).save(buffer, 'JPEG', quality=95, subsampling=0)
  return buffer.getvalue()
