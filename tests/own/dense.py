"""A toy segmentation: how bright is each pixel of a photo? One file for all that it needs."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from hivit_jax.data.sources import base
from hivit_jax.tasks import ImageTask
from hivit_jax.tasks.evaluators import Collected, Evaluator, Summed
from hivit_jax.tasks.images import normalize

IGNORED = 255


class Brightness:
  """`photo_tiles` with a label map: 0 to 2 for dark, medium and bright; the borders are ignored."""

  def __init__(self, split: str, data_dir: str | None = None):
    self._tiles = base.open_source('photo_tiles', split, data_dir)
    self.name, self.split = 'brightness', split
    self.class_names, self.num_classes = (), 0

  def __len__(self) -> int:
    return len(self._tiles)

  def __getitem__(self, index: int) -> dict:
    image = self._tiles[index]['image']
    labels = bright_or_dark(np.asarray(Image.open(io.BytesIO(image)).convert('L')))
    labels[: index % 8] = IGNORED  # as many rows as no other example nearby
    file = io.BytesIO()
    Image.fromarray(labels).save(file, 'PNG')
    return {'image': image, 'segmentation': file.getvalue()}

  def example_name(self, index: int) -> str:
    return self._tiles.example_name(index)


def bright_or_dark(grey: np.ndarray) -> np.ndarray:
  """(H, W) uint8 brightness -> labels."""
  return np.digitize(grey, (85, 170)).astype(np.uint8)


class DenseModel(nnx.Module):
  """Two convolutions with BatchNorm between them."""

  def __init__(
    self,
    *,
    num_classes: int,
    channels: int = 3,
    embed_dim: int = 8,
    normalised: bool = True,
    rngs: nnx.Rngs,
  ):
    self.stem = nnx.Conv(channels, embed_dim, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(embed_dim, momentum=0.9, rngs=rngs) if normalised else None
    self.out = nnx.Conv(embed_dim, num_classes, (1, 1), rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """(B, H, W, channels) -> (B, H, W, classes) logits."""
    x = self.stem(images)
    if self.norm is not None:
      x = self.norm(x)
    return self.out(nnx.relu(x))


@dataclasses.dataclass(frozen=True)
class DenseTask(ImageTask):
  """Tell the class of each pixel."""

  model_class = DenseModel
  model_kind = 'dense model'
  measures = frozenset(('evaluation',))
  fields = ('image', 'segmentation')

  num_classes: int

  def shapes(self, size, channels):
    return {
      'image': jax.ShapeDtypeStruct((*size, channels), np.uint8),
      'segmentation': jax.ShapeDtypeStruct(size, np.uint8),
    }

  def prepare(self, model, batch, rng):
    del model, rng
    known = (batch['segmentation'] != IGNORED).sum()
    return {
      'image': batch['image'],
      'segmentation': batch['segmentation'],
      'count': jnp.maximum(known, 1).astype(jnp.float32),
    }

  def loss(self, model, batch):
    logits = model(normalize(batch['image'], self.mean, self.std))
    target = jax.nn.one_hot(batch['segmentation'], self.num_classes)  # nothing where ignored
    loss = -(target * jax.nn.log_softmax(logits)).sum() / batch['count']
    right = logits.argmax(axis=-1) == batch['segmentation']
    return loss, {'pixel_accuracy': right.sum() / batch['count']}

  def confusion(self, model, batch):
    """(classes, classes) float32 numbers of pixels by what they are and what the model says."""
    logits = model(normalize(batch['image'], self.mean, self.std))
    target = jax.nn.one_hot(batch['segmentation'], self.num_classes)
    target = target * batch['mask'][:, None, None, None]
    found = jax.nn.one_hot(logits.argmax(axis=-1), self.num_classes)
    return jnp.einsum('bhwt,bhwf->tf', target, found)

  def evaluators(self, context):
    every = context.every('evaluation')
    return [
      Evaluator(every, Summed(context, source, self.confusion, _mean_iou, name=name))
      for name, source in (context.sets.items() if every else ())
    ]


def _mean_iou(confusion):
  both = np.diag(confusion)
  union = confusion.sum(axis=0) + confusion.sum(axis=1) - both
  return {'miou': np.mean(both / np.maximum(union, 1)), 'pixels': confusion.sum()}


def brightness_of_set(context) -> Evaluator:
  """An evaluator of one's own: mean pixel value of the evaluation images, the last ones first."""

  def predict(model, batch):
    del model
    return batch['image'].astype(jnp.float32).mean(axis=(1, 2, 3))

  def finish(values, index):
    return {'brightness': np.average(values, weights=1 + index), 'images': len(index)}

  return Evaluator(4, Collected(context, context.sets['eval'], predict, finish))
