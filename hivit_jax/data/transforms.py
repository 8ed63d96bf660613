"""From an example of a source to the arrays that the device gets.

A training transform is called as `transform(example, rng)`, or `transform(example, rng, shape)` in
a step to which the order gives a shape; an evaluation transform as `transform(example)`. Both
return a dict of arrays that have the same shapes for every example; see `fields` for what they make
of which field. Everything random comes from `rng`, so an example's augmentation is fixed by the
generator that the loader makes for its place in the stream.

A training transform is decoding, then a row of steps `(example, rng) -> example` on the decoded
fields; a new augmentation is one more step in such a row. A step that moves pixels draws once, and
`fields` moves everything in the example with them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from hivit_jax.data import fields, randaugment
from hivit_jax.data.fields import Example
from hivit_jax.errors import UserError
from hivit_jax.settings import DTYPES, MAX_CHANNELS, image_size, is_picture

Size = int | Sequence[int]
Step = Callable[[Example, np.random.Generator], Example]

INTERPOLATIONS = {
  'bicubic': Image.Resampling.BICUBIC,
  'bilinear': Image.Resampling.BILINEAR,
}


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

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    # Not `resize(box=...)`: that lets pixels from outside the crop bleed in at its border.
    width, height = example['image'].size
    example = fields.crop(example, self.box(width, height, rng), self)
    interpolation = INTERPOLATIONS[self.interpolation]
    return fields.resize(example, (self.size[1], self.size[0]), interpolation, self)


@dataclasses.dataclass(frozen=True)
class RandomFlip:
  """Swaps left and right in half of the cases."""

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    return fields.mirror(example, self) if rng.random() < 0.5 else example


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

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    image = example['image']
    for change, factor in self.draw(rng):
      image = change(image).enhance(factor)
    return {**example, 'image': image}


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """Decodes an example, applies the steps one after the other, and makes arrays of the result.

  Attributes:
    steps: On decoded examples. Those with an attribute `size`, (height, width), give their output
      in the shape of a training step where it has one of its own.
    channels: Of the image.
    keys: Fields of the example that are used.
    dtype: Of the image's pixels, see `fields.decode`.
    reduce_jpegs: The same; the first step has to resize.
  """

  steps: tuple[Step, ...]
  channels: int = 3
  keys: tuple[str, ...] = fields.CLASSIFIED
  dtype: str = 'uint8'
  reduce_jpegs: bool = False

  def __post_init__(self):
    _check_pixels(self.channels, self.dtype)

  def __call__(
    self,
    example: Mapping[str, Any],
    rng: np.random.Generator,
    shape: tuple[int, ...] | None = None,
  ) -> dict[str, np.ndarray]:
    decoded = fields.decode(example, self.keys, self.channels, self.dtype, self.reduce_jpegs)
    for step in self.steps:
      if shape is not None and hasattr(step, 'size'):
        step = dataclasses.replace(step, size=shape)  # pyright: ignore[reportArgumentType]
      decoded = step(decoded, rng)
    return fields.to_arrays(decoded)


def train_transform(
  size: Size,
  *,
  channels: int = 3,
  dtype: str = 'uint8',
  keys: Sequence[str] = fields.CLASSIFIED,
  scale: tuple[float, float] = (0.2, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  clamp: bool = False,
  interpolation: str = 'bicubic',
  flip: bool = True,
  rand_augment: str | None = None,
  color_jitter: float = 0.0,
  mean: Sequence[float] = (0.5,),
  reduce_jpegs: bool = False,
) -> TrainTransform:
  """Returns an augmentation for training: crop and mirror image, then a change of colours and form.

  The first two alone are the augmentation of MAE pretraining. The order is that of timm, which the
  published recipes for classifiers use.

  Args:
    size: Side of the square output, or (height, width), in pixels.
    channels, dtype: Of the image, see `fields.decode`.
    keys: Fields of the example that are used, such as 'segmentation'; the label is -1 where a
      source has none.
    scale, ratio, clamp, interpolation: See `RandomResizedCrop`.
    flip: Mirror half of the images; off for data in which left and right matter, such as digits.
    rand_augment: Such as 'rand-m9-mstd0.5-inc1', see `randaugment.rand_augment`; None or '': off.
    color_jitter: See `ColorJitter`; 0: off. RandAugment, when given, takes its place. Both are for
      bytes of 1 or 3 channels.
    mean: Colour that RandAugment fills in, per channel, in [0, 1]: that of the data set.
    reduce_jpegs: Decode JPEGs at 1/2 or 1/4 where a crop is much larger than the output;
      faster, and pixels differ a little, see `reduced.Reducible`.

  Raises:
    UserError: The size, the channels, the crop, RandAugment or the jitter makes no sense.
  """
  jitter, size = ColorJitter(color_jitter), image_size(size, 'image_size')
  if (rand_augment or color_jitter) and not is_picture(channels, dtype):
    raise UserError(
      f'rand_augment={rand_augment}, color_jitter={color_jitter:g}: they take bytes of 1 or 3 '
      f'channels, not {dtype} of {channels}.'
    )
  steps: list[Step] = [RandomResizedCrop(size, scale, ratio, clamp, interpolation)]
  if flip:
    steps.append(RandomFlip())
  if rand_augment:
    steps.append(randaugment.rand_augment(rand_augment, mean))
  elif color_jitter:
    steps.append(jitter)
  return TrainTransform(tuple(steps), channels, tuple(keys), dtype, reduce_jpegs)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """Decodes, resizes and takes the central crop; see `eval_transform`."""

  size: tuple[int, int]
  crop: float | None = None
  channels: int = 3
  keys: tuple[str, ...] = fields.CLASSIFIED
  steps: tuple[Callable[[Example], Example], ...] = ()
  dtype: str = 'uint8'

  def __post_init__(self):
    _check_pixels(self.channels, self.dtype)

  def __call__(self, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
    decoded = fields.decode(example, self.keys, self.channels, self.dtype)
    for step in self.steps:
      decoded = step(decoded)
    width, height = decoded['image'].size
    h, w = self.size
    # The rectangle that the resized image has to cover.
    if self.crop is not None:
      cover_h, cover_w = int(h / self.crop), int(w / self.crop)
    else:
      cover_h, cover_w = (h * 256 // 224, w * 256 // 224) if max(h, w) <= 224 else (h, w)
    if cover_h * width >= cover_w * height:
      resized = cover_h * width // height, cover_h
    else:
      resized = cover_w, cover_w * height // width
    decoded = fields.resize(decoded, resized, Image.Resampling.BICUBIC, self)
    left, top = round((resized[0] - w) / 2), round((resized[1] - h) / 2)
    return fields.to_arrays(fields.crop(decoded, (left, top, left + w, top + h), self))


def eval_transform(
  size: Size,
  crop: float | None = None,
  *,
  channels: int = 3,
  dtype: str = 'uint8',
  keys: Sequence[str] = fields.CLASSIFIED,
  steps: Sequence[Callable[[Example], Example]] = (),
) -> EvalTransform:
  """Returns the transform of the published evaluations: resize, then the central crop.

  Up to size S = 224 the shorter side becomes `int(S * 256 / 224)`, above it S; bicubic with
  antialiasing. For a non-square size the image is made just large enough to cover (height, width),
  with the same margin when both are at most 224, and keeps its aspect ratio.

  Args:
    size: Side of the square output, or (height, width), in pixels.
    crop: Share of the resized image's sides that the crop keeps, in (0, 1], instead of 7/8 up to
      224 pixels and 1 above: 1 for images whose borders matter.
    channels, dtype, keys: See `train_transform`.
    steps: On decoded examples, before they are resized.

  Raises:
    UserError: The size, the crop or the channels make no sense.
  """
  if crop is not None and not 0 < crop <= 1:
    raise UserError(f'Evaluation crop {crop!r}: expected more than 0, at most 1.')
  size = image_size(size, 'image_size')
  return EvalTransform(size, crop, channels, tuple(keys), tuple(steps), dtype)


def _check_pixels(channels: int, dtype: str) -> None:
  if not (isinstance(channels, int) and 1 <= channels <= MAX_CHANNELS):
    raise UserError(f'channels={channels!r}: expected a number from 1 to {MAX_CHANNELS}.')
  if dtype not in DTYPES:
    raise UserError(f'dtype={dtype!r}: expected one of {", ".join(DTYPES)}.')
