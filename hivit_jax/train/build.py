"""From a config to the objects it describes. Below here nobody knows about configs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.tasks.mae import MAETask
from hivit_jax.train import optim, schedules, weights

_DTYPES = ('auto', 'float32', 'bfloat16')


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """(height, width) in pixels; a config may also give one side."""
  size = config.image_size
  return (size, size) if isinstance(size, int) else tuple(size)


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
  create, init = model_creator(config), config.init

  def load():
    model = create()
    if init.path:
      weights.load_weights(model, init.path, partial=init.partial, ema=init.ema)
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
