"""What a task is: the contract between a model, its training and its evaluation."""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.tasks.evaluators import Context, Evaluator

if TYPE_CHECKING:  # a benchmark of a step needs no data
  from hivit_jax.data.order import Order, Pass

Batch = Mapping[str, jax.Array]


class Task(Protocol):
  """What a model is trained for.

  A task is a frozen dataclass whose fields are plain settings, filled by name from the config; see
  `train.assemble.task`. A subclass needs `prepare` and `loss`; the rest has defaults.

  Attributes:
    model_class: class of the models that it trains.
    model_kind: what they are called in messages.
    rules: what the optimizer does with a parameter: (pattern, label), where the first pattern that
      matches the whole path, such as blocks/0/mlp/fc1/kernel, decides. 'decay': weight decay
      applies; 'no_decay': it does not; 'frozen': the optimizer never changes it. Batch statistics
      are frozen whatever the rules say.
    encoder: beginning of the paths of the encoder's parameters, such as backbone/: with layer decay
      all others are of the last layer.
    stem_is_one_layer: with layer decay, all before the first attention is of the first layer.
    needs_classes: the examples need integer labels, and the model one output for each class.
    pixel_classes: the examples need label maps, and the model one output for each class.
    object_classes: the same of examples with objects.
    any_images: images may have any channels and type; else they are bytes, RGB or grey.
    whole_batches: why a batch cannot be computed in parts, if it cannot.
    required: settings that it cannot do without, which may be None for others, with an example.
    measures: sections of the config that its evaluators read: evaluation, knn, rankme, pictures.
    without_weights: warning for a run that starts from random parameters, if it needs one.
    example: arguments of `python -m hivit_jax.tools.` for a finished run, {workdir} in them.
  """

  model_class: ClassVar[type] = nnx.Module
  model_kind: ClassVar[str] = 'model'
  rules: ClassVar[Sequence[tuple[str, str]]] = (
    (r'(.*/)?(bias|scale)', 'no_decay'),
    (r'.*', 'decay'),
  )
  encoder: ClassVar[str] = ''
  stem_is_one_layer: ClassVar[bool] = False
  needs_classes: ClassVar[bool] = False
  pixel_classes: ClassVar[bool] = False
  object_classes: ClassVar[bool] = False
  any_images: ClassVar[bool] = False
  whole_batches: ClassVar[str | None] = None
  required: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
  measures: ClassVar[frozenset[str]] = frozenset()
  without_weights: ClassVar[str | None] = None
  example: ClassVar[str | None] = None

  def input(self, train: bool) -> Callable[..., dict[str, Any]]:
    """The transform from an example to arrays of fixed shape: with `(example, rng)` in training."""
    ...

  def shapes(self, size: tuple[int, int], channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What `input` makes of one example, for plans and measurements of steps without data.

    Args:
      size: (height, width) of the images.
      channels: of the images.
    """
    return {
      'image': jax.ShapeDtypeStruct((*size, channels), jnp.uint8),
      'label': jax.ShapeDtypeStruct((), jnp.int32),
    }

  def order(self, source: Any, seed: int, batch_size: int) -> 'Order | None':
    """The order of the training examples; None: all of them in each epoch, shuffled."""
    del source, seed, batch_size
    return None

  def eval_order(self, source: Any, batch_size: int) -> 'Pass | None':
    """The order of evaluation examples; None: that of the source."""
    del source, batch_size
    return None

  def prepare(self, model: Any, batch: Batch, rng: jax.Array) -> Batch:
    """Draws all random numbers of a whole batch and computes all normalisers that data decide.

    Args:
      model: the model to be trained.
      batch: what `input` gives, stacked.
      rng: PRNG key of this step.

    Returns:
      What `loss` needs. Arrays are split along their first axis when a batch is computed in parts;
      scalars, such as the number of labelled pixels, go to every part.
    """
    ...

  def loss(self, model: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The share of a part in the loss and metrics of its batch.

    Every term is already divided by what `prepare` has counted in the whole batch, so parts add up
    exactly, whatever is ignored in them. A normaliser that depends on the model's output is the
    part's own, which the task documents. Batch statistics are read from the model afterwards.

    Args:
      model: the model; its batch statistics are updated in place.
      batch: from `prepare`, whole or a part of it.

    Returns:
      () float32 loss, and metrics, which are added over parts, too.
    """
    ...

  def protocol(self) -> str:
    """How evaluations show an image to the model, if scores depend on it, for logs."""
    return ''

  def evaluators(self, context: Context) -> list[Evaluator]:
    """What measures a model of this task; the same for training and for `--mode=evaluate`."""
    del context
    return []


@dataclasses.dataclass(frozen=True)
class ImageTask(Task):
  """A task on images that the config says how to crop and augment.

  Attributes:
    fields: of the examples that the task uses.
    mean, std: per channel, of pixels in [0, 1], or of floats as they are.
    dtype: of stored pixels.
    transforms: `(train, keys=fields) -> transform` that the config describes; None where no data
      are read.
  """

  any_images = True
  fields: ClassVar[tuple[str, ...]] = ('image', 'label')

  mean: Sequence[float]
  std: Sequence[float]
  dtype: str = dataclasses.field(default='uint8', kw_only=True)
  transforms: Callable[..., Callable[..., dict[str, Any]]] | None = dataclasses.field(
    default=None, kw_only=True, compare=False
  )

  def shapes(self, size: tuple[int, int], channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((*size, channels), jnp.dtype(self.dtype))
    return super().shapes(size, channels) | {'image': image}

  def input(self, train: bool) -> Callable[..., dict[str, Any]]:
    assert self.transforms is not None, 'this task was made without data'
    return self.transforms(train, keys=self.fields)
