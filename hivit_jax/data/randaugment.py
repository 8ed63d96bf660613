"""RandAugment (https://arxiv.org/abs/1909.13719) with the operations and the sampling of timm.

Of every image, `num_ops` operations are drawn with replacement and each is applied with probability
0.5. The magnitude of an operation is normally distributed and clipped to [0, 10]. This is timm's
"increasing" set: a higher magnitude never means a weaker change.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from hivit_jax.data import fields
from hivit_jax.errors import UserError

PROBABILITY = 0.5
MAX_MAGNITUDE = 10
_BICUBIC = Image.Resampling.BICUBIC

# One value per channel of 'RGB', or that of 'L'.
Fill = tuple[int, ...] | int


@dataclasses.dataclass(frozen=True)
class Operation:
  """What an operation does, and how much of it.

  Attributes:
    apply: `apply(image, argument, fill)` returns another image of the same size and mode; `fill` is
      the colour of what lies outside the image.
    argument: `argument(level, sign)`, the level in [0, 1] (magnitude / 10), the sign 1 or -1.
  """

  apply: Callable[[Image.Image, float, Fill], Image.Image]
  argument: Callable[[float, int], float] = lambda level, sign: level


def _signed(most: float) -> Callable[[float, int], float]:
  return lambda level, sign: sign * level * most


def _affine(matrix: Callable[[float, int, int], Sequence[float]]) -> Callable[..., Image.Image]:
  """`matrix(argument, width, height)`: from output to input coordinates, two rows of three."""
  return lambda image, argument, fill: image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix(argument, *image.size),
    resample=_BICUBIC,
    fillcolor=fill,
  )


def _enhance(enhancer: Callable[[Image.Image], Any]) -> Operation:
  return Operation(
    lambda image, factor, _: enhancer(image).enhance(factor),
    lambda level, sign: max(0.1, 1 + sign * level * 0.9),
  )


def _solarize_add(image: Image.Image, amount: float, _: Fill) -> Image.Image:
  table = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
  return image.point(table * len(image.getbands()))


OPERATIONS = {
  'AutoContrast': Operation(lambda image, *_: ImageOps.autocontrast(image)),
  'Equalize': Operation(lambda image, *_: ImageOps.equalize(image)),
  'Invert': Operation(lambda image, *_: ImageOps.invert(image)),
  'Rotate': Operation(
    lambda image, degrees, fill: image.rotate(degrees, _BICUBIC, fillcolor=fill), _signed(30)
  ),
  'PosterizeIncreasing': Operation(
    lambda image, bits, _: ImageOps.posterize(image, int(bits)),
    lambda level, _: max(1, 4 - int(level * 4)),  # Pillow no longer takes 0 bits.
  ),
  'SolarizeIncreasing': Operation(
    lambda image, threshold, _: ImageOps.solarize(image, int(threshold)),
    lambda level, _: 256 - int(level * 256),
  ),
  'SolarizeAdd': Operation(_solarize_add, lambda level, _: int(level * 110)),
  'ColorIncreasing': _enhance(ImageEnhance.Color),
  'ContrastIncreasing': _enhance(ImageEnhance.Contrast),
  'BrightnessIncreasing': _enhance(ImageEnhance.Brightness),
  'SharpnessIncreasing': _enhance(ImageEnhance.Sharpness),
  'ShearX': Operation(_affine(lambda shear, *_: (1, shear, 0, 0, 1, 0)), _signed(0.3)),
  'ShearY': Operation(_affine(lambda shear, *_: (1, 0, 0, shear, 1, 0)), _signed(0.3)),
  'TranslateXRel': Operation(
    _affine(lambda share, width, _: (1, 0, share * width, 0, 1, 0)), _signed(0.45)
  ),
  'TranslateYRel': Operation(
    _affine(lambda share, _, height: (1, 0, 0, 0, 1, share * height)), _signed(0.45)
  ),
}
_NAMES = tuple(OPERATIONS)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """A step `(example, rng) -> example` on 'RGB' and 'L' images; see the module, and `rand_augment`.

  Half of the operations move pixels, so an example must have nothing else that depends on places.

  Attributes:
    magnitude: Mean strength of the operations, in [0, 10].
    magnitude_std: Its standard deviation; the drawn magnitude is clipped to [0, 10].
    num_ops: Operations drawn for an image.
    mean: Colour of what lies outside the image, per channel, in [0, 1]. With another number of
      channels than the image's, their average is used.
  """

  magnitude: float
  magnitude_std: float
  num_ops: int
  mean: tuple[float, ...]

  def draw(self, rng: np.random.Generator) -> list[tuple[str, float, int]]:
    """Draws what is applied to one image: names, magnitudes in [0, 10] and signs (1 or -1)."""
    drawn = []
    for _ in range(self.num_ops):
      name = _NAMES[rng.integers(len(_NAMES))]
      if rng.random() < PROBABILITY:
        magnitude = min(max(rng.normal(self.magnitude, self.magnitude_std), 0), MAX_MAGNITUDE)
        drawn.append((name, magnitude, 1 if rng.random() < 0.5 else -1))
    return drawn

  def fill(self, mode: str) -> Fill:
    """The mean colour as an image of this mode, 'RGB' or 'L', stores it."""
    mean = self.mean if len(self.mean) == len(mode) else [np.mean(self.mean)] * len(mode)
    values = [round(255 * float(value)) for value in mean]
    return tuple(values) if mode == 'RGB' else values[0]

  def __call__(self, example: fields.Example, rng: np.random.Generator) -> fields.Example:
    return fields.per_field(example, self, {'image': lambda image: self._augment(image, rng)})

  def _augment(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    fill = self.fill(image.mode)
    for name, magnitude, sign in self.draw(rng):
      operation = OPERATIONS[name]
      image = operation.apply(image, operation.argument(magnitude / MAX_MAGNITUDE, sign), fill)
    return image


def rand_augment(spec: str, mean: Sequence[float]) -> RandAugment:
  """Returns the RandAugment that a string in timm's notation describes.

  Args:
    spec: 'rand', then in any order `m9` (magnitude, default 10), `mstd0.5` (its standard deviation,
      default 0), `n2` (operations for an image, default 2), and always `inc1`.
    mean: See `RandAugment`.

  Raises:
    UserError: The string means something else.
  """
  kind, *parts = spec.split('-')
  matches = [re.fullmatch(r'(m|mstd|n|inc)(\d+(?:\.\d+)?)', part) for part in parts]
  given = {match[1]: float(match[2]) for match in matches if match}
  settings = {'m': 10, 'mstd': 0, 'n': 2, 'inc': 0} | given
  if not (
    kind == 'rand'
    and len(given) == len(parts)
    and settings['m'] <= MAX_MAGNITUDE
    and settings['n'] in range(1, 11)
    and settings['inc'] == 1
  ):
    raise UserError(
      f'RandAugment "{spec}": expected a string such as "rand-m9-mstd0.5-inc1", of "rand", "inc1", '
      'and at most one each of m (magnitude, 0 to 10), mstd (its standard deviation) and n '
      '(operations for an image, 1 to 10).'
    )
  return RandAugment(settings['m'], settings['mstd'], int(settings['n']), tuple(mean))
