"""From a config to the objects it describes. Below here nobody knows about configs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hivit_jax import models, settings
from hivit_jax.errors import UserError, flag
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.simmim import SimMIM
from hivit_jax.models.units import UNIT
from hivit_jax.ops import barriers
from hivit_jax.ops.choice import ATTENTION
from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.mae import MAETask
from hivit_jax.train import optim, schedules, sharding, step

_DTYPES = ('auto', 'float32', 'bfloat16')
_LARGE_WIDTH = 256  # channels of the main stage
_PUBLISHED_CLASSES = 1000  # of a config that names no number, before there is a data set
# task -> class of its models, how they are called, rules of the optimizer
_TASKS = {
  'mae': (MaskedAutoencoder, 'masked autoencoder', optim.PRETRAIN_RULES),
  'simmim': (SimMIM, 'SimMIM', optim.SIMMIM_RULES),
  'classify': (Classifier, 'classifier', optim.CLASSIFY_RULES),
  'linear': (Classifier, 'classifier', optim.LINEAR_RULES),
}


def is_pretraining(config: ml_collections.ConfigDict) -> bool:
  """Whether the task needs no labels."""
  return config.task in ('mae', 'simmim')


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """(height, width) in pixels; a config may also give one side.

  Raises:
    UserError: not a size, or not a multiple of the units' side.
  """
  sides = settings.image_size(config.image_size, 'config.image_size')
  if any(side % UNIT for side in sides):
    near = [max(UNIT, round(side / UNIT) * UNIT) for side in sides]
    raise UserError(
      f'config.image_size={config.image_size}: sides must be multiples of {UNIT} pixels; '
      f'try --config.image_size={near[0]},{near[1]}'
    )
  return sides


def is_large(config: ml_collections.ConfigDict) -> bool:
  """Whether a step takes long enough for `host_memory.keep_freed_memory(one_arena=True)`."""
  known = config.model.name in models.MODELS
  own = models.settings_of(config.model.name)['embed_dim'] if known else 0
  width = config.model.embed_dim or own
  if 'swin' in (config.model.name or ''):  # it tells the first stage's
    width *= 4
  return width >= _LARGE_WIDTH


def compute_dtype(config: ml_collections.ConfigDict, platform: str | None = None) -> str:
  """float32 or bfloat16; 'auto' is bfloat16 except on CPUs, which are slow at it.

  Args:
    config: see configs/base.py.
    platform: of the devices that it is for; None: JAX's own.
  """
  dtype = config.model.dtype
  if dtype not in _DTYPES:
    raise UserError(f'config.model.dtype="{dtype}" is not one of {", ".join(_DTYPES)}')
  if dtype == 'auto':
    return 'float32' if (platform or jax.default_backend()) == 'cpu' else 'bfloat16'
  return dtype


def attention(config: ml_collections.ConfigDict, devices: Sequence[Any] = ()) -> str:
  """The implementation of attention, see `ops.choice`; 'xla' where there is no NVIDIA GPU.

  Args:
    config: see configs/base.py.
    devices: that it is for; none: JAX's own.
  """
  chosen = config.model.get('attention', 'xla')  # older runs have none
  if chosen not in ATTENTION:
    raise UserError(f'config.model.attention="{chosen}" is not one of {", ".join(ATTENTION)}')
  device = devices[0] if len(devices) else jax.local_devices()[0]
  if chosen == 'xla' or device.platform != 'gpu':
    return 'xla'
  reason = None
  capability = str(getattr(device, 'compute_capability', '8.0'))
  if compute_dtype(config, device.platform) == 'float32':
    reason = 'computes in bfloat16 only: --config.model.dtype=bfloat16'
  elif not capability[:1].isdecimal() or float(capability) < 8:  # AMD's are names, such as gfx942
    reason = f'takes an NVIDIA GPU of compute capability 8.0 or more, not {capability}'
  if chosen == 'auto':
    return 'auto' if reason is None and config.model.get('ops') != 'plain' else 'xla'
  if reason is None:
    return chosen
  raise UserError(f'config.model.attention={chosen} {reason}, or --config.model.attention=auto')


def model_creator(
  config: ml_collections.ConfigDict, devices: Sequence[Any] = ()
) -> Callable[[], Any]:
  """Returns a function that builds the config's model, for devices or JAX's own."""
  arguments = {k: v for k, v in config.model.items() if v is not None and k != 'name'}
  if arguments.get('scan') is False:  # the default; older runs of Swin and SimMIM name it, too
    del arguments['scan']
  arguments |= {
    'image_size': image_size(config),
    'channels': config.channels,
    'dtype': compute_dtype(config, devices[0].platform if len(devices) else None),
    'attention': attention(config, devices),
  }

  def create():
    try:
      return models.create_model(config.model.name, seed=config.seed, **arguments)
    except UserError as error:  # models know their arguments, not where these come from
      culprit = str(error).split('=')[0].split(' ')[0]
      section = (
        'config.' if culprit in config else 'config.model.' if culprit in config.model else ''
      )
      raise UserError(f'{section}{error}') from error

  return create


def task_of(model_class: type) -> str:
  """Name of the first task that trains models of a class."""
  return next(name for name, (wanted, *_) in _TASKS.items() if issubclass(model_class, wanted))


def check_model(config: ml_collections.ConfigDict) -> None:
  """UserError unless `config.task` is a task and `config.model.name` a model for it."""
  if config.task not in _TASKS:
    raise UserError(f'config.task="{config.task}" is unknown; there are: {", ".join(_TASKS)}')
  wanted, kind, _ = _TASKS[config.task]
  fitting = [name for name, (cls, _) in models.MODELS.items() if issubclass(cls, wanted)]
  name = config.model.name
  if name is None:
    raise UserError(
      'config.model.name is not set; hivit_jax.list_models() has the names, such as '
      f'{flag("model.name", fitting[0])}. To evaluate weights: '
      '--config=configs/evaluate.py --mode=evaluate'
    )
  if not issubclass(models.MODELS.get(name, (wanted,))[0], wanted):
    size = name.rsplit('_', 1)[-1]
    guess = next((other for other in fitting if other.endswith(f'_{size}')), fitting[0])
    raise UserError(
      f'config.model.name="{name}" is no {kind}, which config.task="{config.task}" needs; '
      f'try {flag("model.name", guess)}'
    )


def task(config: ml_collections.ConfigDict) -> MAETask | ClassifyTask:
  """The task named by `config.task`."""
  check_model(config)
  statistics = {'mean': tuple(config.data.mean), 'std': tuple(config.data.std)}
  if is_pretraining(config):
    return MAETask(**statistics)
  a = config.augment
  return ClassifyTask(
    **statistics,
    num_classes=config.model.num_classes or _PUBLISHED_CLASSES,
    label_smoothing=a.label_smoothing,
    erase=a.erase,
    mixup=a.mixup,
    cutmix=a.cutmix,
    switch_probability=a.switch_probability,
    mix_group=a.mix_group,
  )


def optimizer(config: ml_collections.ConfigDict) -> Callable[[Any], optim.Optimizer]:
  """Returns a function from parameters to their optimizer."""
  o = config.optim
  shared = {
    'rules': _TASKS[config.task][2],
    'weight_decay': o.weight_decay,
    'clip_norm': o.clip_norm,
    'layer_decay': o.layer_decay,
  }
  if o.name == 'adamw':
    own = {'b1': o.b1, 'b2': o.b2, 'eps': o.eps}
    return lambda params: optim.adamw(params, **shared, **own)
  if o.name == 'lars':
    return lambda params: optim.lars(params, **shared, momentum=o.momentum)
  raise UserError(f'config.optim.name="{o.name}" is unknown; there are: adamw, lars')


def schedule(config: ml_collections.ConfigDict) -> schedules.Schedule:
  """Fractional epoch -> learning rate."""
  o = config.optim

  def rate(key: str) -> float:
    return o[f'base_{key}'] * config.batch_size / 256 if o[key] is None else o[key]

  return schedules.Schedule(
    name=o.schedule,
    lr=rate('lr'),
    end_lr=rate('end_lr'),
    warmup_start_lr=rate('warmup_start_lr'),
    warmup_epochs=o.warmup_epochs,
    warmup_prefix=o.warmup_prefix,
    epochs=config.epochs,
    milestones=tuple(o.milestones),
    milestone_factor=o.milestone_factor,
    scaled=o.layer_decay_of,
  )


class Training(NamedTuple):
  """What a config's training consists of.

  Attributes:
    task: see `task`.
    graphdef, optimizer, abstract: see `step.abstract_state`.
    train_step: see `step.make_train_step`.
  """

  task: MAETask | ClassifyTask
  graphdef: nnx.GraphDef
  optimizer: optim.Optimizer
  abstract: step.State
  train_step: Callable


def training(
  config: ml_collections.ConfigDict, mesh: Mesh, *, epochs_per_step: float = 1e-3
) -> Training:
  """The training step and its state; nothing is compiled or computed yet.

  Args:
    config: see configs/base.py.
    mesh: the devices.
    epochs_per_step: batch size / examples in an epoch, for the learning rate.
  """
  chosen = task(config)  # first: it checks the model's name
  graphdef, tx, abstract = step.abstract_state(
    model_creator(config, list(mesh.devices.flat)),
    optimizer(config),
    mesh,
    ema=config.ema_decay is not None,
  )
  train_step = step.make_train_step(
    graphdef,
    chosen,
    tx,
    schedule(config),
    epochs_per_step=epochs_per_step,
    seed=config.seed,
    abstract=abstract,
    accumulate_steps=config.accumulate_steps,
    ema_decay=config.ema_decay,
    compiler_options=barriers.compiler_options(mesh.devices.flat[0].platform),
  )
  return Training(chosen, graphdef, tx, abstract, train_step)


def abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """Shapes, types and places of what a training step of the config takes."""
  place = sharding.batch_sharding(mesh)
  images = (config.batch_size, *image_size(config), config.channels)
  return {
    'image': jax.ShapeDtypeStruct(images, np.uint8, sharding=place),
    'label': jax.ShapeDtypeStruct(images[:1], np.int32, sharding=place),
  }


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
