"""Pictures of what a model makes of images: its features, its attention, and what it finds alike.

  python -m hivit_jax.tools.features (--workdir=WORKDIR | --weights=FILE) IMAGES... [--out=DIR]
      [--image_size=HEIGHTxWIDTH | own] [--units=ROW,COLUMN ... [--block=N]] [--point=X,Y]
      [--folder=DIR] [--ema]

Writes into --out:

  pca.png         the three principal components of each level as red, green and blue, for all
                  images in the same basis
  attention.png   with --units: what these units attend to in the last block, or --block
  similarity.png  with --point, in pixels of the first image: how alike all places of all images are
  neighbours.png  with --folder: the images in it that are nearest to each image
  features.npz    the numbers of all these

IMAGES are files, or folders of them. Those that cannot be read are reported and skipped, and the
exit status is 2.
"""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from hivit_jax import cli, settings
from hivit_jax.data.decode import decode_image
from hivit_jax.errors import UserError
from hivit_jax.interop import carried
from hivit_jax.models import inside
from hivit_jax.reporting.console import setup_logging
from hivit_jax.runtime import compilation_cache
from hivit_jax.tools import components, feature_sheets, image_flags, loaded, looking, neighbours
from hivit_jax.tools.feature_sheets import Looked
from hivit_jax.train import weights

flags.adopt_module_key_flags(image_flags)
_OUT = flags.DEFINE_string('out', 'features', 'Folder for the pictures and arrays.')
_IMAGE_SIZE = flags.DEFINE_string(
  'image_size', None, 'HEIGHTxWIDTH, or "own": that of each image; default: that of the model.'
)
_UNITS = flags.DEFINE_multi_string('units', [], 'ROW,COLUMN of a unit, from 0; several times.')
_BLOCK = flags.DEFINE_integer('block', None, 'Block with attention, from 0; default: the last.')
_POINT = flags.DEFINE_string('point', None, 'X,Y in pixels of the first image, from 0.')
_FOLDER = flags.DEFINE_string('folder', None, 'Folder of images to find the nearest in.')
_COUNT = flags.DEFINE_integer('count', 5, 'How many nearest images are shown.', lower_bound=1)

_STEP = 32  # pixels: the coarsest stride


def main(argv: list[str]) -> None:
  source = image_flags.checked(argv)
  units = [_two_numbers('units', text, 'row,column of a unit') for text in _UNITS.value]
  if _BLOCK.value is not None and not units:
    raise UserError(f'--block={_BLOCK.value}: attention of which units? Give --units=ROW,COLUMN')
  point = _POINT.value and _two_numbers('point', _POINT.value, 'x,y in pixels of the first image')
  paths = loaded.image_paths(argv[1:])
  bank_paths = loaded.image_paths([_FOLDER.value]) if _FOLDER.value else []
  setup_logging()
  compilation_cache.turn_on()
  state = weights.read(source, ema=image_flags.EMA.value)
  described = carried.model_of(state)
  loaded.check_pictures_can_be_read(state, described)
  model: Any = loaded.model(state, described)
  statistics = carried.statistics(state, described)
  failed: list[str] = []
  images = list(loaded.read(paths, _resizing(model, described.name), failed))
  if not images:
    raise UserError(f'none of the {len(paths)} images could be read')
  _check_places(images, model, units, point)
  look = _looker(model, described.name, statistics, units)
  looked = [look(path, *image) for path, image in images]

  title = f'{described.name}, {state.source}'
  levels = [components.principal(maps) for maps in zip(*(one.maps for one in looked), strict=True)]
  sheets = {'pca': feature_sheets.colours(looked, levels, title)}
  arrays: dict[str, Any] = {'paths': [one.path for one in looked]}
  for level, found in enumerate(levels, 1):
    arrays |= {f'mean{level}': found.mean, f'basis{level}': found.basis}
    for i, one in enumerate(looked):
      arrays |= {f'{i}/level{level}': one.maps[level - 1], f'{i}/pca{level}': found.projected[i]}
  if units:
    sheets['attention'] = feature_sheets.attention(looked, units, model, title)
    arrays |= {f'{i}/attention': one.attention for i, one in enumerate(looked)}
  if point:
    similarity = _similarity(looked, point)
    sheets['similarity'] = feature_sheets.similarity(looked, similarity, point, title)
    for i, maps in enumerate(similarity):
      arrays |= {f'{i}/similarity{level}': x for level, x in enumerate(maps, 1)}
  if bank_paths:
    near = _neighbours(looked, bank_paths, model, statistics, failed)
    sheets['neighbours'] = feature_sheets.neighbours(looked, near, title)
    arrays['neighbour_paths'] = [[other.path for other in row] for row in near]
    arrays['neighbour_similarities'] = [[other.similarity for other in row] for row in near]
  _write(pathlib.Path(_OUT.value).expanduser(), sheets, arrays)
  if failed:
    raise UserError(f'{len(failed)} of {len(paths) + len(bank_paths)} images could not be read')


def _two_numbers(flag: str, text: str, meaning: str) -> tuple[int, int]:
  match = re.fullmatch(r'(\d+),(\d+)', text)
  if not match:
    raise UserError(f'--{flag}={text}: expected {meaning}, from 0, such as --{flag}=3,5')
  return int(match[1]), int(match[2])


def _check_places(
  images: Sequence[tuple[str, Any]], model: Any, units: Sequence[tuple[int, int]], point: Any
) -> None:
  """UserError for units that an image does not have, or a point outside the first one."""
  for path, (_, pixels) in images:
    rows, columns = inside.grid_of(model, pixels.shape[:2])
    for row, column in units:
      if row >= rows or column >= columns:
        raise UserError(
          f'--units={row},{column}: {path} has {rows} rows and {columns} columns of units, from 0'
        )
  path, ((height, width), _) = images[0]
  if point and (point[0] >= width or point[1] >= height):
    raise UserError(
      f'--point={_POINT.value}: {path} is {width} pixels wide and {height} high, counted from 0'
    )


def _resizing(model: Any, name: str) -> Callable[[bytes], tuple[tuple[int, int], np.ndarray]]:
  """A function from a file's bytes to the image's own (height, width) and its resized pixels."""
  size = model.image_size
  if _IMAGE_SIZE.value and not inside.takes_any_size(model):
    raise UserError(
      f'--image_size={_IMAGE_SIZE.value}: {name} takes images of {size[0]}x{size[1]} pixels only; '
      'leave out the flag'
    )
  if _IMAGE_SIZE.value and _IMAGE_SIZE.value != 'own':
    size = settings.image_size(_IMAGE_SIZE.value, '--image_size')
    if any(side % _STEP for side in size):
      raise UserError(f'--image_size={_IMAGE_SIZE.value}: expected multiples of {_STEP}, or "own"')

  def resize(data: bytes):
    image = decode_image(data, channels=model.channels)
    own = image.height, image.width
    height, width = size
    if _IMAGE_SIZE.value == 'own':
      height, width = (max(_STEP, round(side / _STEP) * _STEP) for side in own)
    return own, looking.resized(image, (height, width))

  return resize


def _looker(
  model: Any, name: str, statistics: dict[str, Any], units: Sequence[tuple[int, int]]
) -> Callable[..., Looked]:
  """A function from path, own size and pixels of an image to what the model computes of it."""

  def chosen(attention: Sequence[jax.Array], grid: tuple[int, int]) -> jax.Array | None:
    if not units:
      return None
    rows, columns = grid
    block = _block(attention, name, rows * columns)  # (heads, N, N)
    return looking.of_units(block, units, grid)

  compute = looking.function(model, chosen, **statistics)

  def look(path: str, own: tuple[int, int], pixels: np.ndarray) -> Looked:
    return Looked(path, own, pixels, *compute(pixels))

  return look


def _block(attention: Sequence[jax.Array], name: str, units: int) -> jax.Array:
  """Of one image, the chosen block's attention (heads, N, N) over the whole of it."""
  count = len(attention)
  block = count - 1 if _BLOCK.value is None else _BLOCK.value
  if not 0 <= block < count:
    raise UserError(f'--block={block}: {name} has {count} blocks with attention, from 0')
  chosen = looking.of_image(attention[block][0], units)
  if chosen is None:
    everywhere = [i for i, x in enumerate(attention) if x.ndim == 4]
    others = f'; these attend to all units: {", ".join(map(str, everywhere))}' if everywhere else ''
    raise UserError(f'--block={block}: it attends within windows in {name}{others}')
  return chosen


def _similarity(looked: Sequence[Looked], point: tuple[int, int]) -> list[list[np.ndarray]]:
  """Of each image and level, cosine similarities (h, w) to the first image's cell at a point."""
  x, y = point
  height, width = looked[0].own
  cells = []
  for features in looked[0].maps:
    rows, columns, _ = features.shape
    cells.append(features[y * rows // height, x * columns // width])
  return [
    [components.cosine(*pair) for pair in zip(one.maps, cells, strict=True)] for one in looked
  ]


def _neighbours(
  looked: Sequence[Looked],
  paths: Sequence[str],
  model: Any,
  statistics: dict[str, Any],
  failed: list[str],
) -> list[list[feature_sheets.Neighbour]]:
  """Of each image the nearest in a folder; all in the model's own size."""
  size = inside.encoder_of(model).image_size

  def decode(data: bytes) -> np.ndarray:
    return looking.resized(decode_image(data, channels=model.channels), size)

  queries = [image for _, image in loaded.read([one.path for one in looked], decode, [])]
  bank = loaded.read(paths, decode, failed)
  found = neighbours.nearest(queries, bank, model, statistics, _COUNT.value)
  if not found:
    raise UserError(f'--folder={_FOLDER.value}: none of its {len(paths)} images could be read')
  # Of a folder of any size only what is drawn is in memory.
  drawn = dict(loaded.read(sorted({path for row in found for path, _ in row}), decode, failed))
  return [
    [feature_sheets.Neighbour(path, drawn[path], alike) for path, alike in row if path in drawn]
    for row in found
  ]


def _write(out: pathlib.Path, sheets: dict[str, Image.Image], arrays: dict[str, Any]) -> None:
  with cli.writing('out', out):
    out.mkdir(parents=True, exist_ok=True)
    for name, sheet in sheets.items():
      sheet.save(out / f'{name}.png')
    np.savez(out / 'features.npz', **arrays)
  print(f'wrote {", ".join(f"{name}.png" for name in sheets)} and features.npz to {out}')


if __name__ == '__main__':
  cli.run(main)
