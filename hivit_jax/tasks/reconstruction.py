"""Pictures of what a masked autoencoder reconstructs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw

from hivit_jax.errors import UserError
from hivit_jax.models import any_mask, targets
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.masking import NORM_PIX_EPS, mask_to_noise, unit_moments
from hivit_jax.models.simmim import SimMIM
from hivit_jax.models.units import join_units, split_units
from hivit_jax.tasks.evaluators import Context, Evaluator, Metrics
from hivit_jax.tasks.fonts import default_font
from hivit_jax.tasks.images import Display, denormalize, normalize, scaled

_HIDDEN = 128  # grey level of units that a panel leaves out
_MIN_SIDE = 144  # pixels: smaller images are enlarged by a whole factor
_MARGIN = 8


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """Arrays (B, H, W, 3 or 1) uint8, and how they came about.

  Attributes:
    original: the images.
    masked: removed units grey.
    reconstruction: predictions for the removed units, the others grey: the loss leaves visible
      units out, so what the decoder gives there is noise and no reconstruction.
    pasted: predictions for the removed units, original pixels elsewhere.
    mask_ratio: share of the units removed.
    norm_pix: the model predicts units up to mean and variance; both were taken from the original.
  """

  original: np.ndarray
  masked: np.ndarray
  reconstruction: np.ndarray
  pasted: np.ndarray
  mask_ratio: float
  norm_pix: bool


def predict_pixels(
  model: MaskedAutoencoder | SimMIM,
  images: jax.Array,
  noise: jax.Array | None = None,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  mask_ratio: float | None = None,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs the model and undoes its normalisation per unit; traceable.

  Args:
    model: the autoencoder.
    images: (B, H, W, C) as stored.
    noise: (B, N), the smallest are kept.
    mean, std: per channel, of pixels in [0, 1].
    mask_ratio: instead of the model's.
    mask: (B, N), 1 = removed, instead of noise and ratio; one program for masks of any count.

  Returns:
    (B, H, W, C) float32 predicted images, normalised by mean and std; (B, N) mask, 1 = removed.
  """
  normalized = normalize(images, mean, std)
  if mask is None:
    out = model(normalized, noise=noise, mask_ratio=mask_ratio)
    pred, mask = out.pred, out.mask
  else:
    pred = any_mask.predict(model, normalized, mask)
  if model.norm_pix_loss:
    units = split_units(normalized)
    average, variance = unit_moments(units.reshape(pred.shape))
    pred = pred * jnp.sqrt(variance + NORM_PIX_EPS) + average
  side = math.isqrt(pred.shape[2] // images.shape[-1])
  units = pred.reshape(*pred.shape[:2], side, side, images.shape[-1])
  return join_units(units, model.grid), mask


def random_noise(model: MaskedAutoencoder | SimMIM, count: int, seed: int) -> np.ndarray:
  """(count, N) float32 that decides which units of images are kept; the same for one seed."""
  return np.random.default_rng(seed).random((count, math.prod(model.grid)), np.float32)


def random_mask(
  model: MaskedAutoencoder | SimMIM, seed: int, ratio: float | None = None
) -> np.ndarray:
  """(N,) bool, True = removed: the mask that a `Reconstructor` draws for one image.

  Args:
    model: the autoencoder.
    seed: of the mask.
    ratio: share of the units removed; None: the model's.

  Raises:
    UserError: the ratio keeps no unit, or all of them.
  """
  keep = model.settings.kept(model.mask_ratio if ratio is None else ratio)
  order = np.argsort(random_noise(model, 1, seed)[0], kind='stable')
  return ~np.isin(np.arange(len(order)), order[:keep])


def assemble(
  images: np.ndarray,
  pixels: np.ndarray,
  mask: np.ndarray,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  norm_pix: bool,
  channels: Sequence[int] | None = None,
) -> Reconstruction:
  """Pictures from the images (B, H, W, C) as stored and the results of `predict_pixels`.

  Args:
    images, pixels, mask: see there.
    mean, std: per channel, of pixels in [0, 1], or of floats as they are.
    norm_pix: see `Reconstruction`.
    channels: that are shown, see `Display.of`.
  """
  b, h, w, _ = images.shape
  side = math.isqrt(h * w // mask.shape[1])
  removed = np.asarray(mask, bool).reshape(b, h // side, w // side)
  removed = removed.repeat(side, axis=1).repeat(side, axis=2)[..., None]  # (B, H, W, 1)
  display = Display.of(images, channels)
  original = display(scaled(images))
  predicted = display(denormalize(np.asarray(pixels, np.float32), mean, std))
  return Reconstruction(
    original=original,
    masked=np.where(removed, np.uint8(_HIDDEN), original),
    reconstruction=np.where(removed, predicted, np.uint8(_HIDDEN)),
    pasted=np.where(removed, predicted, original),
    mask_ratio=float(np.mean(mask)),
    norm_pix=norm_pix,
  )


def draw(result: Reconstruction, *, title: str = '') -> Image.Image:
  """One row an image: original, masked, reconstruction, reconstruction with the visible units."""
  notes = ['grey in the reconstruction: visible units, which are not part of the loss']
  if result.norm_pix:
    notes.append('mean and variance of predicted units are the true ones (norm_pix_loss)')
  columns: dict[str, np.ndarray] = {
    'original': result.original,
    f'masked ({100 * result.mask_ratio:.0f} %)': result.masked,
    'reconstruction': result.reconstruction,
    'with visible units': result.pasted,
  }
  b, h, w, _ = result.original.shape
  scale = max(1, -(-_MIN_SIDE // min(h, w)))
  cell_h, cell_w = h * scale + _MARGIN, w * scale + _MARGIN
  font = default_font()
  line = 20
  head = _MARGIN + line * (1 + bool(title))
  width = max(4 * cell_w + _MARGIN, int(max(map(font.getlength, (title, *notes)))) + 2 * _MARGIN)
  canvas = Image.new('RGB', (width, head + b * cell_h + line * len(notes) + _MARGIN // 2), 'white')
  pen = ImageDraw.Draw(canvas)
  pen.text((_MARGIN, _MARGIN // 2), title, 'black', font)
  for column, (label, images) in enumerate(columns.items()):
    left = _MARGIN + column * cell_w
    pen.text((left, head - line), label, 'black', font)
    for row in range(b):
      cell = Image.fromarray(_to_rgb(images[row])).resize(
        (w * scale, h * scale), Image.Resampling.NEAREST
      )
      canvas.paste(cell, (left, head + row * cell_h))
  for i, note in enumerate(reversed(notes)):
    pen.text((_MARGIN, canvas.height - line * (i + 1)), note, 'dimgray', font)
  return canvas


def _to_rgb(image: np.ndarray) -> np.ndarray:
  """(H, W, C) -> (H, W, 3): three channels as they are, else the first one as grey."""
  return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)


class Reconstructor:
  """Masks, predicts and assembles: `reconstructor(params, images, seed=0)`.

  Args:
    graphdef: static half of a masked autoencoder or a `SimMIM`, from `nnx.split`.
    mean, std: per channel, of pixels in [0, 1].
    mask_ratio: instead of the model's.
    channels: that are shown, see `assemble`.
  """

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    mask_ratio: float | None = None,
    channels: Sequence[int] | None = None,
  ):
    def predict(params, images, noise, mask):
      model = nnx.merge(graphdef, params)
      return predict_pixels(
        model, images, noise, mean=mean, std=std, mask_ratio=mask_ratio, mask=mask
      )

    self._graphdef = graphdef
    self._predict = jax.jit(predict)
    self._options: dict[str, Any] = {'mean': mean, 'std': std, 'channels': channels}

  def __call__(
    self, params: Any, images: np.ndarray, *, seed: int = 0, mask: np.ndarray | None = None
  ) -> Reconstruction:
    """Pictures of images and what the model makes of them.

    Args:
      params: of the model.
      images: (B, H, W, C) as stored.
      seed: draws the masks; the same seed draws the same ones.
      mask: (B, N), 1 or True = removed, instead; masks of any count share one program.

    Raises:
      UserError: the model predicts no pixels, or the mask does not fit.
    """
    model = nnx.merge(self._graphdef, params)
    predicts = getattr(model, 'predicts', targets.PIXELS)
    if predicts != targets.PIXELS:
      raise UserError(
        f'there is nothing to draw: the target of this model is {predicts}, not pixels'
      )
    noise = random_noise(model, len(images), seed) if mask is None else None
    if mask is not None:
      mask, _ = mask_to_noise(mask, math.prod(model.grid))
    pixels, removed = jax.device_get(self._predict(params, images, noise, mask))
    return assemble(images, pixels, removed, norm_pix=model.norm_pix_loss, **self._options)


NAME = 'reconstructions'  # of the pictures' directory
_DRAWN = (None, targets.PIXELS)  # there are no pictures of features


def evaluators(context: Context, *, mean: Sequence[float], std: Sequence[float]) -> list[Evaluator]:
  """Reconstructions of the same evaluation images each time; none where they have no place to go.

  Args:
    context: what to draw with.
    mean, std: per channel, of pixels in [0, 1].
  """
  every = context.every('pictures')
  if every is None or not context.draws or context.setting('model.target') not in _DRAWN:
    return []
  source = context.some(next(iter(context.sets.values())), context.setting('pictures.count'))
  images = context.examples(source)['image']
  channels = context.setting('pictures.channels')
  reconstruct = Reconstructor(context.graphdef, mean=mean, std=std, channels=channels)

  def run(step: int, state: Any) -> Metrics:
    params = context.here(state['params'])
    if params is not None:
      result = reconstruct(params, images, seed=context.seed)
      context.draw(step, NAME, draw(result, title=f'{context.model_name}, step {step}'))
    return {}

  return [Evaluator(every, run)]
