"""What a model has to show of a picture, as the page of `tools.serve` asks for it."""

import base64
import functools
import io
import threading
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from hivit_jax.data import decode
from hivit_jax.data.decode import BrokenImage, decode_image
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, files, infer
from hivit_jax.models import inside, targets
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.simmim import SimMIM
from hivit_jax.tasks import segmentation_pictures
from hivit_jax.tasks.detection_evaluation import SHOWN_SCORE
from hivit_jax.tasks.reconstruction import Reconstructor, random_mask
from hivit_jax.tools import (
  class_names,
  components,
  loaded,
  looking,
  predict_classes,
  predict_objects,
  predict_pixels,
)

MAX_PIXELS = 50_000_000  # of a picture: 150 MB in memory
MAX_RATIO = 20  # of its sides: to cover a square, narrower ones would become very long
_SIDE = 1024  # pixels: what segmenters and detectors get is reduced to it
_MAPS = 512  # pixels: side of the image whose feature maps are shown, where any size is taken
_TOP = 5  # classes of a picture
_LISTED = 12  # classes of pixels, or objects
_REMEMBERED = 4  # pictures, which come again with every mask


class Playground:
  """Everything that a model shows of a picture; one request at a time, from any thread.

  Args:
    state: the weights.
    labels: file with the names of the classes, see `class_names.of`.

  Raises:
    UserError: the model is not one of pictures, or the names do not fit.
  """

  def __init__(self, state: files.StateDict, labels: str | None = None):
    described = carried.model_of(state)
    loaded.check_pictures_can_be_read(state, described)
    model: Any = loaded.model(state, described)
    statistics: dict[str, Any] = carried.statistics(state, described)
    self._lock = threading.Lock()
    self._model = model
    self._described, self._source = described, state.source
    self._features = looking.function(model, **statistics)
    self._view = loaded.view(state, described)
    self._seen = functools.lru_cache(_REMEMBERED)(self._read)
    kind = infer.family(state.arrays)
    self._find = None
    self._any_size = kind in ('segmenter', 'detector')
    if kind == 'classifier':
      self._find = _Classes(state, model, statistics, labels)
    elif kind == 'segmenter':
      self._find = _Pixels(state, model, statistics, labels)
    elif kind == 'detector':
      self._find = _Objects(state, model, statistics, labels)
    self._reconstructs = (
      isinstance(model, MaskedAutoencoder | SimMIM)
      and getattr(model, 'predicts', targets.PIXELS) == targets.PIXELS
    )
    if self._reconstructs:
      graphdef, self._params = nnx.split(model)
      self._reconstructor = Reconstructor(graphdef, **statistics)

  def about(self) -> dict[str, Any]:
    """The model and, if it reconstructs, `units`: the grid of masks and the ratio of training.

    `moments` is true where mean and variance of predicted units are the picture's.
    """
    about: dict[str, Any] = {'name': self._described.name, 'source': self._source, 'units': None}
    if self._reconstructs:
      rows, columns = self._model.grid
      about['units'] = {
        'rows': rows,
        'columns': columns,
        'ratio': self._model.mask_ratio,
        'moments': self._model.norm_pix_loss,
      }
    return about

  def look(self, data: bytes) -> dict[str, Any]:
    """What the model sees and finds in a picture file, and its feature maps.

    Returns:
      For JSON: `seen`, what the model gets as a picture, with its `width` and `height`; `levels`,
      each a `picture` with `text`; `found`, see `_Classes`, or None.

    Raises:
      BrokenImage: it is no picture, or has too many pixels.
    """
    with self._lock:
      image = self._seen(data)
      maps, _ = self._features(self._for_maps(image))
      levels = []
      for level, features in zip(inside.encoder_of(self._model).feature_info, maps, strict=True):
        colours = components.principal([features]).colours[0]
        rows, columns, channels = features.shape
        text = f'level {level.level}: {rows}x{columns}, {channels} channels'
        levels.append({'text': text, 'picture': _url(np.rint(255 * colours))})
      return {
        'seen': _url(image),
        'height': image.shape[0],
        'width': image.shape[1],
        'levels': levels,
        'found': self._find and self._find(image),
      }

  def reconstruct(
    self, data: bytes, *, mask: str | None = None, ratio: float | None = None, seed: int = 0
  ) -> dict[str, Any]:
    """What an autoencoder makes of a picture file from the units that a mask keeps.

    Args:
      data: the file.
      mask: a character for each unit, row by row: 1 removes it, 0 keeps it.
      ratio: share of the units that are removed at random if there is no mask; None: the model's.
      seed: of them; with the same one `tools.reconstruct` removes the same units.

    Returns:
      For JSON: `mask`, and the pictures `reconstruction` and `pasted` of a `Reconstruction`.

    Raises:
      BrokenImage: see `look`.
      UserError: the mask or the ratio does not fit, or the model does not reconstruct pixels.
    """
    if not self._reconstructs:
      raise UserError(f'{self._described.name} does not reconstruct pixels')
    if mask is None:
      removed = random_mask(self._model, seed, ratio)
    else:
      rows, columns = self._model.grid
      if len(mask) != rows * columns or set(mask) - {'0', '1'}:
        raise UserError(f'mask: expected {rows * columns} characters, each 0 or 1')
      removed = np.array([unit == '1' for unit in mask])
    with self._lock:
      image = self._seen(data)
      result = self._reconstructor(self._params, image[None], mask=removed[None])
    return {
      'mask': ''.join('1' if unit else '0' for unit in removed),
      'reconstruction': _url(result.reconstruction[0]),
      'pasted': _url(result.pasted[0]),
    }

  def compile(self) -> None:
    """Makes the first picture as quick as the others."""
    square = Image.new('RGB', (_SIDE, _SIDE), 'grey')
    file = io.BytesIO()
    square.save(file, 'PNG')
    self.look(file.getvalue())
    if self._reconstructs:
      self.reconstruct(file.getvalue())

  def _read(self, data: bytes) -> np.ndarray:
    """(H, W, channels) uint8: what the model gets, or an image of any size, reduced to `_SIDE`."""
    if data.startswith(decode.NUMPY_FILES):
      raise BrokenImage('an array, not a picture')
    image = decode_image(data, channels=self._model.channels, max_pixels=MAX_PIXELS)
    if max(image.size) > MAX_RATIO * min(image.size):
      raise BrokenImage(
        f'{image.width}x{image.height} pixels; the longer side may be at most {MAX_RATIO} times '
        'the shorter one'
      )
    if not self._any_size:
      return self._view({'image': np.asarray(image)})['image']
    image.thumbnail((_SIDE, _SIDE))
    return np.asarray(image).reshape(image.height, image.width, -1)

  def _for_maps(self, image: np.ndarray) -> np.ndarray:
    """The whole image in the one size in which feature maps are computed."""
    if not self._any_size:
      return image
    size = inside.encoder_of(self._model).image_size
    if inside.takes_any_size(self._model):
      size = min(size[0], _MAPS), min(size[1], _MAPS)
    return looking.resized(_picture(image), size)


class _Classes:
  """The classes of a picture: `title`, `picture` or None, `rows` of `label`, `share`, `colour`."""

  def __init__(self, state: files.StateDict, model: Any, statistics: Any, labels: str | None):
    names = class_names.of(state, len(state.arrays['head.weight']), labels)
    self._classify = predict_classes.Classification(model, names, 1, **statistics)

  def __call__(self, image: np.ndarray) -> dict[str, Any]:
    rows = [_row(one.label, one.probability) for one in self._classify([image], _TOP)[0]]
    return {'title': 'Classes', 'picture': None, 'rows': rows}


class _Pixels:
  """The classes of a picture's pixels, see `_Classes`."""

  def __init__(self, state: files.StateDict, model: Any, statistics: Any, labels: str | None):
    self._names = class_names.of(state, model.num_classes, labels)
    task = predict_pixels.task_of(state.metadata, model, **statistics)
    self._segment = predict_pixels.PixelClasses(model, task, self._names)

  def __call__(self, image: np.ndarray) -> dict[str, Any]:
    labels = next(self._segment([self._segment.decode(image)]))
    colours = self._segment.colours
    drawn = segmentation_pictures.overlay(image, labels, colours)
    found = self._segment.shares(labels)[:_LISTED]
    rows = [_row(one['label'], one['share'], colours[one['index']]) for one in found]
    return {'title': 'Classes of pixels', 'picture': _url(drawn), 'rows': rows}


class _Objects:
  """The objects in a picture, see `_Classes`."""

  def __init__(self, state: files.StateDict, model: Any, statistics: Any, labels: str | None):
    self._names = class_names.of(state, model.num_classes, labels, predict_objects.known_names)
    task = predict_objects.task_of(state.metadata, model, **statistics)
    self._find = predict_objects.Objects(model, task, self._names)

  def __call__(self, image: np.ndarray) -> dict[str, Any]:
    found = self._find(image)
    drawn = self._find.draw(image, found)
    shown = [one for one in found if one['score'] >= SHOWN_SCORE][:_LISTED]
    rows = [
      _row(self._names[one['category_id']], one['score'], self._find.colours[one['category_id']])
      for one in shown
    ]
    title = f'Objects with a score of at least {SHOWN_SCORE}'
    return {'title': title, 'picture': _url(np.asarray(drawn)), 'rows': rows}


def _row(label: Any, share: float, colour: Any = ()) -> dict[str, Any]:
  return {'label': label, 'share': share, 'colour': [int(part) for part in colour]}


def _picture(pixels: np.ndarray) -> Image.Image:
  """(H, W, 3 or 1) from 0 to 255."""
  pixels = pixels.astype(np.uint8)
  return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _url(pixels: np.ndarray) -> str:
  """The picture as the address of a PNG that contains it."""
  file = io.BytesIO()
  _picture(pixels).save(file, 'PNG')
  return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
