"""From a decoded image to the uint8 array that the device gets.

A training transform is called as `transform(image, rng)`, an evaluation transform as
`transform(image)`; both return uint8 (H, W, C). Everything random comes from `rng`, so an image's
augmentation is fixed by the generator that the pipeline makes for its place in the stream.

A training transform is a row of steps `(image, rng) -> image` on PIL images; a new augmentation is
one more step in such a row.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from hivit_jax.data import randaugment
from hivit_jax.errors import UserError
from hivit_jax.settings import image_size

Size = int | Sequence[int]
Step = Callable[[Image.Image, np.random.Generator], Image.Image]

INTERPOLATIONS = {
  'bicubic': Image.Resampling.BICUBIC,
  'bilinear': Image.Resampling.BILINEAR,
}


def to_array(image: Image.Image) -> np.ndarray:
  """Returns the pixels of an 'RGB' or 'L' image as uint8 (H, W, 3) or (H, W, 1)."""
  array = np.asarray(image)
  return array if array.ndim == 3 else array[..., None]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """A random part of the image, resized with antialiasing ("Inception crop").

  The crop covers a uniformly drawn share of the area, its aspect ratio is drawn log-uniformly; ten
  draws that do not fit are followed by the largest central crop of an allowed ratio. This is the
  sampling of torchvision's transform of the same name, which the published recipes use.

  Attributes:
    size: Output (height, width).
    scale: Smallest and largest share of the image's area, in (0, 1].
    ratio: Narrowest and widest aspect ratio (width / height) relative to that of the output. For a
      non-square output this keeps the distortion within the same bounds as for a square one.
    clamp: A crop that does not fit is cut to the image's sides instead of being drawn again, so
      large crops are more frequent. MAE's linear probe crops in this way.
    interpolation: Of the resizing: a key of `INTERPOLATIONS`.
  """

  size: tuple[int, int]
  scale: tuple[float, float] = (0.2, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  clamp: bool = False
  interpolation: str = 'bicubic'

  def __post_init__(self):
    low, high = self.scale
    if not 0 < low <= high <= 1:
      raise UserError(f'Crop scale {self.scale!r}: expected 0 < smallest <= largest <= 1.')
    low, high = self.ratio
    if not 0 < low <= high:
      raise UserError(f'Crop ratio {self.ratio!r}: expected 0 < narrowest <= widest.')
    if self.interpolation not in INTERPOLATIONS:
      known = ', '.join(INTERPOLATIONS)
      raise UserError(f'Interpolation {self.interpolation!r}: expected one of {known}.')

  def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws a crop (left, top, right, bottom) of an image of this size, in pixels."""
    output_ratio = self.size[1] / self.size[0]
    low, high = (output_ratio * ratio for ratio in self.ratio)
    log_low, log_high = math.log(low), math.log(high)
    for _ in range(10):
      area = width * height * rng.uniform(*self.scale)
      ratio = math.exp(rng.uniform(log_low, log_high))
      w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
      if self.clamp:
        w, h = min(max(w, 1), width), min(max(h, 1), height)
      if 0 < w <= width and 0 < h <= height:
        top = int(rng.integers(height - h + 1))
        left = int(rng.integers(width - w + 1))
        return left, top, left + w, top + h
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    # Not `resize(box=...)`: that lets pixels from outside the crop bleed in at its border.
    cropped = image.crop(self.box(image.width, image.height, rng))
    height, width = self.size
    return cropped.resize((width, height), INTERPOLATIONS[self.interpolation])


@dataclasses.dataclass(frozen=True)
class RandomFlip:
  """Mirrors the image left to right in half of the cases."""

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class ColorJitter:
  """Changes brightness, contrast and saturation, in random order, as torchvision's does.

  Attributes:
    amount: Every change is by a factor drawn uniformly from [max(0, 1 - amount), 1 + amount].
  """

  amount: float

  def __post_init__(self):
    if self.amount < 0:
      raise UserError(f'Colour jitter {self.amount!r}: expected 0 (off) or more, such as 0.4.')

  def draw(self, rng: np.random.Generator) -> list[tuple[type, float]]:
    """Draws the changes of one image, in their order: classes of `ImageEnhance` and factors."""
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    low, high = max(0, 1 - self.amount), 1 + self.amount
    return [(changes[index], rng.uniform(low, high)) for index in rng.permutation(3)]

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for change, factor in self.draw(rng):
      image = change(image).enhance(factor)
    return image


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """The steps one after the other, then uint8 (H, W, C)."""

  steps: tuple[Step, ...]

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    for step in self.steps:
      image = step(image, rng)
    return to_array(image)


def train_transform(
  size: Size,
  *,
  scale: tuple[float, float] = (0.2, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  clamp: bool = False,
  interpolation: str = 'bicubic',
  flip: bool = True,
  rand_augment: str | None = None,
  color_jitter: float = 0.0,
  mean: Sequence[float] = (0.5,),
) -> TrainTransform:
  """Returns an augmentation for training: crop and mirror image, then a change of colours and form.

  The first two alone are the augmentation of MAE pretraining. The order is that of timm, which the
  published recipes for classifiers use.

  Args:
    size: Side of the square output, or (height, width), in pixels.
    scale, ratio, clamp, interpolation: See `RandomResizedCrop`.
    flip: Mirror half of the images; off for data in which left and right matter, such as digits.
    rand_augment: Such as 'rand-m9-mstd0.5-inc1', see `randaugment.rand_augment`; None or '': off.
    color_jitter: See `ColorJitter`; 0: off. RandAugment, when given, takes its place.
    mean: Colour that RandAugment fills in, per channel, in [0, 1]: that of the data set.

  Raises:
    UserError: The size, the crop, RandAugment or the jitter makes no sense.
  """
  jitter, size = ColorJitter(color_jitter), image_size(size, 'image_size')
  steps: list[Step] = [RandomResizedCrop(size, scale, ratio, clamp, interpolation)]
  if flip:
    steps.append(RandomFlip())
  if rand_augment:
    steps.append(randaugment.rand_augment(rand_augment, mean))
  elif color_jitter:
    steps.append(jitter)
  return TrainTransform(tuple(steps))


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """Resizes and takes the central crop; see `eval_transform`."""

  size: tuple[int, int]
  crop: float | None = None

  def __call__(self, image: Image.Image) -> np.ndarray:
    width, height = image.size
    h, w = self.size
    # The rectangle that the resized image has to cover.
    if self.crop is not None:
      cover_h, cover_w = int(h / self.crop), int(w / self.crop)
    else:
      cover_h, cover_w = (h * 256 // 224, w * 256 // 224) if max(h, w) <= 224 else (h, w)
    if cover_h * width >= cover_w * height:
      resized = image.resize((cover_h * width // height, cover_h), Image.Resampling.BICUBIC)
    else:
      resized = image.resize((cover_w, cover_w * height // width), Image.Resampling.BICUBIC)
    left, top = round((resized.width - w) / 2), round((resized.height - h) / 2)
    return to_array(resized.crop((left, top, left + w, top + h)))


def eval_transform(size: Size, crop: float | None = None) -> EvalTransform:
  """Returns the transform of the published evaluations: resize, then the central crop.

  Up to size S = 224 the shorter side becomes `int(S * 256 / 224)`, above it S; bicubic with
  antialiasing. For a non-square size the image is made just large enough to cover (height, width),
  with the same margin when both are at most 224, and keeps its aspect ratio.

  Args:
    size: Side of the square output, or (height, width), in pixels.
    crop: Share of the resized image's sides that the crop keeps, in (0, 1], instead of 7/8 up to
      224 pixels and 1 above: 1 for images whose borders matter.

  Raises:
    UserError: The size or the crop makes no sense.
  """
  if crop is not None and not 0 < crop <= 1:
    raise UserError(f'Evaluation crop {crop!r}: expected more than 0, at most 1.')
  return EvalTransform(image_size(size, 'image_size'), crop)
