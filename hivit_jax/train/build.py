"""From a config to the objects it describes. Below here nobody knows about configs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.models.hivit import UNIT
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.tasks.mae import MAETask
from hivit_jax.train import optim, schedules, weights

_DTYPES = ('auto', 'float32', 'bfloat16')


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """(height, width) in pixels; a config may also give one side.

  Raises:
    UserError: not a size, or not a multiple of the units' side.
  """
  size = config.image_size
  sides = (size,) if isinstance(size, int) else tuple(size)
  if len(sides) == 1:
    sides *= 2
  if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
    raise UserError(f'config.image_size={size}: expected a side or (height, width), in pixels')
  if any(side % UNIT for side in sides):
    near = [max(UNIT, round(side / UNIT) * UNIT) for side in sides]
    raise UserError(
      f'config.image_size={size}: sides must be multiples of {UNIT} pixels; '
      f'try --config.image_size={near[0]},{near[1]}'
    )
  return sides[0], sides[1]


def compute_dtype(config: ml_collections.ConfigDict) -> str:
  """float32 or bfloat16; 'auto' is bfloat16 except on CPUs, which are slow at it."""
  dtype = config.model.dtype
  if dtype not in _DTYPES:
    raise UserError(f'config.model.dtype="{dtype}" is not one of {", ".join(_DTYPES)}')
  if dtype == 'auto':
    return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return dtype


def model_creator(config: ml_collections.ConfigDict) -> Callable[[], Any]:
  """Returns a function that builds the config's model."""
  arguments = {k: v for k, v in config.model.items() if v is not None and k != 'name'}
  arguments |= {
    'image_size': image_size(config),
    'channels': config.channels,
    'dtype': compute_dtype(config),
  }

  def create():
    return models.create_model(config.model.name, seed=config.seed, **arguments)

  return create


def initial_model(config: ml_collections.ConfigDict) -> Callable[[], Any]:
  """Returns a function that builds the config's model with the weights of `config.init`."""
  create = model_creator(config)
  path, partial, ema = config.init.path, config.init.partial, config.init.ema

  def load():
    model = create()
    if path:
      weights.load_weights(model, path, partial=partial, ema=ema)
    return model

  return load


def task(config: ml_collections.ConfigDict) -> MAETask:
  """The task named by `config.task`."""
  if config.task != 'mae':
    raise UserError(f'config.task="{config.task}" is unknown; there is: mae')
  if models.MODELS.get(config.model.name, (MaskedAutoencoder,))[0] is not MaskedAutoencoder:
    raise UserError(
      f'config.model.name="{config.model.name}" is no masked autoencoder, which config.task="mae" '
      f'needs; try mae_{config.model.name}'
    )
  return MAETask(mean=tuple(config.data.mean), std=tuple(config.data.std))


def optimizer(config: ml_collections.ConfigDict) -> Callable[[Any], Any]:
  """Returns a function from parameters to their optimizer."""
  keys = ('b1', 'b2', 'eps', 'weight_decay', 'clip_norm')
  arguments = {key: config.optim[key] for key in keys}
  return lambda params: optim.adamw(params, rules=optim.PRETRAIN_RULES, **arguments)


def schedule(config: ml_collections.ConfigDict) -> Callable:
  """Fractional epoch -> learning rate."""
  o = config.optim
  return schedules.warmup_cosine(
    lr=o.base_lr * config.batch_size / 256 if o.lr is None else o.lr,
    end_lr=o.end_lr,
    warmup_start_lr=o.warmup_start_lr,
    warmup_epochs=o.warmup_epochs,
    epochs=config.epochs,
  )


@dataclasses.dataclass(frozen=True)
class Steps:
  """Steps of a run, from epochs over a set of `examples`."""

  examples: int
  batch_size: int

  @property
  def epochs_per_step(self) -> float:
    return self.batch_size / self.examples

  def of(self, epochs: float) -> int:
    """Whole steps in so many epochs, at least one."""
    return max(1, round(epochs / self.epochs_per_step))

  def between_saves(self, checkpoint: ml_collections.ConfigDict) -> int | None:
    """Steps from one checkpoint to the next; None: there is only the one at the end."""
    return self.of(checkpoint.every_epochs) if checkpoint.every_epochs else None

  def between_kept(self, checkpoint: ml_collections.ConfigDict) -> int | None:
    """Steps between checkpoints that are kept for ever, a multiple of `between_saves`, or None."""
    save = self.between_saves(checkpoint)
    if not save or not checkpoint.keep_every_epochs:
      return None
    return save * max(1, round(checkpoint.keep_every_epochs / checkpoint.every_epochs))
