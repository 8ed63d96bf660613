"""Pictures of what a model makes of images, for notebooks: `tools.features`, without files."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from hivit_jax.errors import UserError
from hivit_jax.interop.carried import IMAGENET
from hivit_jax.models import inside
from hivit_jax.tasks.reconstruction import Reconstructor, draw
from hivit_jax.tools import components, feature_sheets, looking

_MEAN, _STD = IMAGENET['mean'], IMAGENET['std']


def reconstruction(
  model: Any,
  images: np.ndarray,
  *,
  seed: int = 0,
  mask_ratio: float | None = None,
  mean: Sequence[float] = _MEAN,
  std: Sequence[float] = _STD,
) -> Image.Image:
  """Masks images and draws what an autoencoder predicts: a row an image.

  Args:
    model: from `create_model`, `mae_*` or `simmim_*`.
    images: (B, H, W, channels) uint8 of the model's image size.
    seed: of the masks.
    mask_ratio: share of the units removed; None: as trained.
    mean, std: per channel, that the model was trained with.

  Raises:
    UserError: the model predicts something else than pixels, or the ratio leaves no unit.
  """
  graphdef, params = nnx.split(model)
  reconstruct = Reconstructor(graphdef, mean=mean, std=std, mask_ratio=mask_ratio)
  return draw(reconstruct(params, images, seed=seed))


class Look:
  """What a model computes of images, and pictures of it: `Look(model, images).components()`.

  Args:
    model: from `create_model`.
    images: (H, W, channels) uint8 each. Models with `features` take any multiples of 32 pixels,
      others their own size.
    names: of the images; default: numbers.
    mean, std: per channel, that the model was trained with.

  Attributes:
    maps: of each image and level (h, w, C) float32.
    attention: of each image (heads, N, N), that of the last block, class token first; None where
      the model has no attention over whole images.

  Raises:
    UserError: images of another size, type or other channels.
  """

  def __init__(
    self,
    model: Any,
    images: Sequence[np.ndarray],
    *,
    names: Sequence[str] | None = None,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
  ):
    def last(attention: Sequence[jax.Array], grid: tuple[int, int]) -> jax.Array | None:
      blocks = [looking.of_image(block[0], grid[0] * grid[1]) for block in attention]
      return next((block for block in reversed(blocks) if block is not None), None)

    compute = looking.function(model, last, mean=mean, std=std)
    computed = [compute(image) for image in images]
    self.maps: list[list[np.ndarray]] = [maps for maps, _ in computed]
    self.attention: list[np.ndarray | None] = [attention for _, attention in computed]
    self._model, self._images = model, images
    self._names = names or [f'image {i}' for i in range(1, len(images) + 1)]
    self._title = type(model).__name__

  def components(self) -> Image.Image:
    """The three principal components of each level as red, green and blue.

    All images share one basis, so that the same colour means the same features.
    """
    levels = [components.principal(maps) for maps in zip(*self.maps, strict=True)]
    return feature_sheets.colours(self._looked(), levels, self._title)

  def attending(self, units: Sequence[tuple[int, int]]) -> Image.Image:
    """How much units attend to every other one: in the mean over the heads, and in each.

    Args:
      units: (row, column) of each, from 0.

    Raises:
      UserError: the model attends within windows only, or an image has no such unit.
    """
    if self.attention[0] is None:
      raise UserError('this model attends within windows only: there is no attention to draw')
    for image in self._images:
      rows, columns = inside.grid_of(self._model, image.shape[:2])
      for row, column in units:
        if not (0 <= row < rows and 0 <= column < columns):
          raise UserError(
            f'units: ({row}, {column}) is none of the {rows} rows and {columns} columns, from 0'
          )
    return feature_sheets.attention(self._looked(units), units, self._model, self._title)

  def similarity(self, point: tuple[int, int]) -> Image.Image:
    """How alike all places of all images are to one point of the first: cosine of the features.

    Args:
      point: (x, y) in pixels, from 0.

    Raises:
      UserError: the point is outside the image.
    """
    (x, y), (height, width) = point, self._images[0].shape[:2]
    if not (0 <= x < width and 0 <= y < height):
      raise UserError(f'point={point}: the first image is {width} pixels wide and {height} high')
    cells = [level[y * len(level) // height, x * level.shape[1] // width] for level in self.maps[0]]
    alike = [
      [components.cosine(*pair) for pair in zip(maps, cells, strict=True)] for maps in self.maps
    ]
    return feature_sheets.similarity(self._looked(), alike, point, self._title)

  def _looked(self, units: Sequence[tuple[int, int]] = ()) -> list[feature_sheets.Looked]:
    rows = zip(self._names, self._images, self.maps, self.attention, strict=True)
    return [
      feature_sheets.Looked(name, image.shape[:2], image, maps, self._of_units(image, x, units))
      for name, image, maps, x in rows
    ]

  def _of_units(
    self, image: np.ndarray, attention: np.ndarray | None, units: Sequence[tuple[int, int]]
  ) -> np.ndarray | None:
    if attention is None or not units:
      return None
    return looking.of_units(attention, units, inside.grid_of(self._model, image.shape[:2]))
