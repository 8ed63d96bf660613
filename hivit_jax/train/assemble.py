"""From a config to the objects it describes. Below here nobody knows about configs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple, cast

import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hivit_jax import models, settings
from hivit_jax.errors import UserError, flag
from hivit_jax.models.units import UNIT
from hivit_jax.ops import barriers
from hivit_jax.ops.choice import ATTENTION
from hivit_jax.tasks import TASKS, Task
from hivit_jax.train import optim, schedules, step

_DTYPES = ('auto', 'float32', 'bfloat16')
_LARGE_WIDTH = 256  # channels of the main stage
# Arguments of models that always have a value; one of your own need not know them.
_ALWAYS_SET = frozenset(
  ('image_size', 'channels', 'dtype', 'attention', 'ops', 'remat', 'drop_path_rate', 'scan')
)
# Fields of tasks and the settings that they are; all others are of one of `_SECTIONS`.
_FIELDS = {
  **{key: f'data.{key}' for key in ('mean', 'std', 'dtype', 'eval_crop')},
  **{key: key for key in ('channels', 'seed')},
  'num_classes': 'model.num_classes',
  'mirror': 'augment.flip',
}
_SECTIONS = ('augment', 'segment', 'detect')  # whose settings fill the fields of their names
_PUBLISHED_CLASSES = 1000  # of a config that names no number, before there is a data set


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
  own = models.settings_of(config.model.name) if config.model.name in models.MODELS else {}
  width = config.model.embed_dim or own.get('embed_dim', 0)
  if 'mlp_stages' in own:  # Swin's is that of the first stage
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
    reason = 'works in bfloat16 only: --config.model.dtype=bfloat16'
  elif not capability[:1].isdecimal() or float(capability) < 8:  # AMD's are names, such as gfx942
    reason = f'needs an NVIDIA GPU of compute capability 8.0 or more, not {capability}'
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
  name = config.model.name
  if settings.is_imported(name or ''):
    return _own_model(name, config.seed, arguments)

  def create():
    try:
      return models.create_model(name, seed=config.seed, **arguments)
    except UserError as error:  # models know their arguments, not where these come from
      culprit = str(error).split('=')[0].split(' ')[0]
      section = (
        'config.' if culprit in config else 'config.model.' if culprit in config.model else ''
      )
      raise UserError(f'{section}{error}') from error

  return create


def _own_model(name: str, seed: int, arguments: Mapping[str, Any]) -> Callable[[], Any]:
  """A function that builds a model from outside the package, with the arguments that it names."""
  cls = settings.imported(name, 'config.model.name')
  accepted = inspect.signature(cls.__init__).parameters.keys() - {'self', 'rngs'}
  for key, value in arguments.items():
    if key not in accepted and key not in _ALWAYS_SET:
      raise UserError(
        f'config.model.{key}={value}: {name} has no argument "{key}"; it takes: '
        + ', '.join(sorted(accepted))
      )
  own = {key: value for key, value in arguments.items() if key in accepted}
  return lambda: cls(**own, rngs=nnx.Rngs(seed))


def task_of(model_class: type) -> str:
  """Name of the first task that trains models of a class."""
  return next(name for name, task in TASKS.items() if issubclass(model_class, task.model_class))


def task_class(config: ml_collections.ConfigDict) -> type[Task]:
  """The class that `config.task` names: one of the table, or package.module:Name."""
  if settings.is_imported(config.task):
    found = settings.imported(config.task, 'config.task')
    if Task not in getattr(found, '__mro__', ()) or not is_dataclass(found):
      raise UserError(f'config.task={config.task} is no dataclass that inherits from tasks.Task')
    return cast(type[Task], found)
  if config.task not in TASKS:
    raise UserError(
      f'config.task="{config.task}" is unknown; there are: {", ".join(TASKS)}, or one of your own, '
      'package.module:Name'
    )
  return TASKS[config.task]


def check_model(config: ml_collections.ConfigDict) -> None:
  """UserError unless `config.task` is a task and `config.model.name` a model for it."""
  chosen, name = task_class(config), config.model.name
  fitting = [n for n, (cls, _) in models.MODELS.items() if issubclass(cls, chosen.model_class)]
  example = flag('model.name', fitting[0] if fitting else 'package.module:Name')
  if name is None:
    raise UserError(
      f'config.model.name is not set; hivit_jax.list_models() has the names, such as {example}. '
      'To evaluate weights: --config=configs/evaluate.py --mode=evaluate'
    )
  if settings.is_imported(name):
    found = settings.imported(name, 'config.model.name')
  else:
    found = models.MODELS.get(name, (chosen.model_class,))[0]
  if not (isinstance(found, type) and issubclass(found, chosen.model_class)):
    size = name.rsplit('_', 1)[-1]
    guess = next((other for other in fitting if other.endswith(f'_{size}')), None)
    raise UserError(
      f'config.model.name="{name}" is not a {chosen.model_kind}, which config.task="{config.task}" '
      f'needs; try {flag("model.name", guess) if guess else example}'
    )


def task(config: ml_collections.ConfigDict, transforms: Callable[..., Any] | None = None) -> Task:
  """The task named by `config.task`; its fields are filled with the settings of their names.

  These are the settings of `config.augment` and `config.segment`, `mean`, `std`, `dtype` and
  `eval_crop` of the data, the model's `num_classes`, `image_size`, `channels`, and `transforms`.

  Args:
    config: see configs/base.py.
    transforms: see `tasks.task.ImageTask`; None: no data are read.
  """
  check_model(config)
  chosen, filled = task_class(config), {}
  if chosen.whole_batches and config.accumulate_steps > 1:
    raise UserError(
      f'config.accumulate_steps={config.accumulate_steps}: config.task={config.task} computes a '
      f'batch as a whole. {chosen.whole_batches}'
    )
  for field in fields(cast(Any, chosen)):
    key = _FIELDS.get(field.name) or _in_section(config, field.name)
    if field.name == 'transforms':
      filled[field.name] = transforms
    elif field.name == 'image_size':
      filled[field.name] = image_size(config)
    elif key is not None:
      value = settings.get(config, key)
      filled[field.name] = tuple(value) if isinstance(value, list) else value
    elif field.default is MISSING and field.default_factory is MISSING:
      raise UserError(
        f'config.task={config.task}: no setting is called {field.name}; give it a default'
      )
  if filled.get('num_classes', 0) is None:
    name = config.model.name
    own = models.settings_of(name) if name in models.MODELS else {}
    filled['num_classes'] = own.get('num_classes', _PUBLISHED_CLASSES)
  return chosen(**filled)


def _in_section(config: ml_collections.ConfigDict, name: str) -> str | None:
  """The dotted setting of this name in one of `_SECTIONS`."""
  found = (f'{section}.{name}' for section in _SECTIONS if name in config.get(section, ()))
  return next(found, None)


def optimizer(config: ml_collections.ConfigDict) -> Callable[..., optim.Optimizer]:
  """Returns a function from parameters, and rules before those of the task, to their optimizer."""
  o, chosen = config.optim, task_class(config)
  model = models.MODELS.get(config.model.name, (None,))[0]
  shared = {
    'weight_decay': o.weight_decay,
    'clip_norm': o.clip_norm,
    'layer_decay': o.layer_decay,
    'encoder': chosen.encoder,
    'stem_is_one_layer': chosen.stem_is_one_layer,
    'merges_are_layers': getattr(model, 'merges_are_layers', False),
  }
  if o.name == 'adamw':
    make, numbers = optim.adamw, {'b1': o.b1, 'b2': o.b2, 'eps': o.eps}
  elif o.name == 'lars':
    make, numbers = optim.lars, {'momentum': o.momentum}
  else:
    raise UserError(f'config.optim.name="{o.name}" is unknown; there are: adamw, lars')
  return lambda params, first=(): make(params, rules=(*first, *chosen.rules), **shared, **numbers)


def schedule(config: ml_collections.ConfigDict, epochs_per_step: float = 1.0) -> schedules.Schedule:
  """Step -> learning rate.

  Args:
    config: see configs/base.py.
    epochs_per_step: batch size / examples in an epoch. With 1, a schedule whose lengths are all in
      epochs is a function of epochs; where all are in steps it does not matter.
  """
  o = config.optim
  unit = epochs_per_step if config.steps is None else 1  # of length and milestones, for a step

  def rate(key: str) -> float:
    return o[f'base_{key}'] * config.batch_size / 256 if o[key] is None else o[key]

  return schedules.Schedule(
    name=o.schedule,
    lr=rate('lr'),
    end_lr=rate('end_lr'),
    warmup_start_lr=rate('warmup_start_lr'),
    warmup=o.warmup_epochs / epochs_per_step if o.warmup_steps is None else o.warmup_steps,
    warmup_prefix=o.warmup_prefix,
    length=(config.steps or config.epochs) / unit,
    power=o.power,
    milestones=tuple(milestone / unit for milestone in o.milestones),
    milestone_factor=o.milestone_factor,
    scaled=o.layer_decay_of,
  )


def mixes_units(config: ml_collections.ConfigDict) -> bool:
  """Whether the learning rate has lengths in epochs and in steps."""
  o = config.optim
  if config.steps is None:
    return o.warmup_steps is not None
  return o.warmup_steps is None and o.warmup_epochs > 0


class Training(NamedTuple):
  """What a config's training consists of.

  Attributes:
    task: see `task`.
    graphdef, optimizer, abstract: see `step.abstract_state`.
    train_step: see `step.make_train_step`.
  """

  task: Task
  graphdef: nnx.GraphDef
  optimizer: optim.Optimizer
  abstract: step.State
  train_step: Callable


def training(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  *,
  chosen: Task | None = None,
  epochs_per_step: float = 1e-3,
) -> Training:
  """The training step and its state; nothing is compiled or computed yet.

  Args:
    config: see configs/base.py.
    mesh: the devices.
    chosen: the config's task; None: without data.
    epochs_per_step: see `schedule`.
  """
  chosen = chosen or task(config)  # first: it checks the model's name
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
    schedule(config, epochs_per_step),
    seed=config.seed,
    abstract=abstract,
    accumulate_steps=config.accumulate_steps,
    ema_decay=config.ema_decay,
    compiler_options=barriers.compiler_options(mesh.devices.flat[0].platform),
  )
  return Training(chosen, graphdef, tx, abstract, train_step)
