"""What a user may want to change in a config, as flags that can be copied."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import jax
import ml_collections

from hivit_jax import settings
from hivit_jax.data.cores import crew, more_workers, usable_cores
from hivit_jax.errors import flag
from hivit_jax.reporting.run_info import ABSENT
from hivit_jax.train import assemble

_Config = ml_collections.ConfigDict


def _not_read(field: str) -> Callable[[_Config], str | None]:
  """Why the task does not read a setting of `augment` or `segment`."""

  def reason(config: _Config) -> str | None:
    fields = {own.name for own in dataclasses.fields(cast(Any, assemble.task_class(config)))}
    return None if field in fields else f'task={config.task}'

  return reason


def _not_reduced(config: _Config) -> str | None:
  """Why JPEGs are decoded whole: beside label maps and objects they always are."""
  task = assemble.task_class(config)
  if task.pixel_classes or task.object_classes:
    return f'task={config.task}'
  return _not_read('transforms')(config)


def _not_measured(section: str) -> Callable[[_Config], str | None]:
  """Why the task does not evaluate by a section."""
  return lambda c: None if section in assemble.task_class(c).measures else f'task={c.task}'


def _no_choice(config: _Config) -> str | None:
  both = config.augment.mixup and config.augment.cutmix
  return None if both else 'used only with both augment.mixup and augment.cutmix'


def _not_in(config: _Config, *schedules: str) -> str | None:
  chosen = config.optim.schedule
  return None if chosen in schedules else f'optim.schedule={chosen}'


# Of the settings of `segment`, those that the k-NN segmentation does not read as well.
_SEGMENT = {
  'scale': (2560, 640), 'ratios': (0.5, 2.0), 'max_share': 0.75, 'photometric': True,
  'mean_over': 'all', 'class_weights': (), 'auxiliary_weight': 0.4, 'inference': 'slide',
  'stride': (426, 426), 'scales': (1.0,), 'mirrored': False,
}  # fmt: skip

# Settings with their defaults, and why nothing reads them in a config; None: something does.
_READERS: tuple[tuple[Mapping[str, Any], Callable[[_Config], str | None]], ...] = (
  *(
    ({f'augment.{key}': 0.0}, _not_read(key))
    for key in ('erase', 'mixup', 'cutmix', 'label_smoothing')
  ),
  *(({f'segment.{key}': default}, _not_read(key)) for key, default in _SEGMENT.items()),
  *(
    ({f'{section}.every_epochs': epochs}, _not_measured(section))
    for section, epochs in (('evaluation', 1.0), ('rankme', 0.0), ('pictures', 20.0))
  ),
  ({'augment.switch_probability': 0.5}, _no_choice),
  (
    {'augment.mix_group': None},
    lambda c: None if c.augment.mixup or c.augment.cutmix else 'no augment.mixup or augment.cutmix',
  ),
  (
    {'optim.milestones': (), 'optim.milestone_factor': 0.1},
    lambda c: _not_in(c, 'step'),
  ),
  (
    {'data.reduce_jpegs': False},
    _not_reduced,
  ),
  ({'optim.power': 1.0}, lambda c: _not_in(c, 'poly')),
  ({'optim.warmup_prefix': True}, lambda c: _not_in(c, 'cosine')),
  ({'optim.base_end_lr': 0.0, 'optim.end_lr': None}, lambda c: _not_in(c, 'cosine', 'poly')),
  (
    {'optim.layer_decay_of': 'rate'},
    lambda c: 'optim.layer_decay=None' if c.optim.layer_decay is None else None,
  ),
  (
    {'augment.color_jitter': 0.0},
    lambda c: f'augment.rand_augment={c.augment.rand_augment}' if c.augment.rand_augment else None,
  ),
  (
    {'optim.b1': 0.9, 'optim.b2': 0.95, 'optim.eps': 1e-8},
    lambda c: 'optim.name=lars' if c.optim.name == 'lars' else None,
  ),
  ({'optim.momentum': 0.9}, lambda c: 'optim.name=adamw' if c.optim.name == 'adamw' else None),
  ({'init_ema': False, 'init_channels': 'repeat'}, lambda c: None if c.init else 'init=None'),
  (
    {'data.data_dir': None},
    lambda c: 'data.name=folder:...' if c.data.name.startswith('folder:') else None,
  ),
)


def without_effect(config: _Config, given: Collection[str] = ()) -> list[str]:
  """Settings that training does not read, with why.

  Args:
    config: see configs/base.py; of its settings those count that differ from their defaults.
    given: dotted settings on the command line, which count whatever their values are.
  """
  unread = {
    key: why
    for defaults, reason in _READERS
    if (why := reason(config)) is not None
    for key, default in defaults.items()
    if settings.get(config, key) != default
  }
  for key in ('lr', 'end_lr', 'warmup_start_lr'):
    if f'optim.base_{key}' in given and config.optim[key] is not None:
      unread[f'optim.base_{key}'] = f'optim.{key}={config.optim[key]}'
  return [f'{key}={settings.get(config, key)} ({why})' for key, why in unread.items()]


def for_memory(
  config: _Config, batches: Sequence[str] = ('batch_size', 'evaluation.batch_size')
) -> str:
  """Ways to use less device memory.

  Args:
    config: see configs/base.py.
    batches: settings that may become smaller.
  """
  ways = []
  if assemble.task_class(config).whole_batches is None:
    ways.append(flag('accumulate_steps', 2 * config.accumulate_steps))
  if not config.model.remat:
    ways.append(flag('model.remat', True))
  for key in batches:
    if settings.get(config, key) > 1:
      ways.append(flag(key, settings.get(config, key) // 2))
  return ', '.join([*ways, 'more devices'])


def for_finite_numbers(config: _Config) -> str:
  """Ways to keep a loss from becoming infinite or NaN."""
  o = config.optim
  ways = [flag('optim.clip_norm', 1.0 if o.clip_norm is None else o.clip_norm / 2)]
  key = 'optim.base_lr' if o.lr is None else 'optim.lr'
  ways.append(flag(key, f'{settings.get(config, key) / 2:g}'))
  if o.warmup_steps:
    ways.append(flag('optim.warmup_steps', 2 * o.warmup_steps))
  elif config.steps is None and 2 * o.warmup_epochs < config.epochs:
    ways.append(flag('optim.warmup_epochs', f'{2 * o.warmup_epochs or config.epochs / 20:g}'))
  if assemble.compute_dtype(config) != 'float32':
    ways.append(flag('model.dtype', 'float32'))
  return ', '.join(ways)


def for_data(config: _Config) -> str:
  """Ways to load data faster."""
  cores, threads, workers = usable_cores(), config.data.num_threads, config.data.num_workers
  now = crew(cores, jax.local_device_count(), threads, workers)
  if now.cores >= cores:
    return f'all {cores} cores load already; store smaller images, or take more cores a device'
  if threads is not None and not now.workers:
    way = flag('data.num_threads', None)
  else:
    way = flag('data.num_workers', more_workers(cores, now.workers))
  return f'{now} load; {way} uses more of {cores} cores'


def to_train_longer(config: _Config) -> str:
  """The setting that ends a run, doubled."""
  if config.max_steps is not None:
    return flag('max_steps', 2 * config.max_steps)
  if config.steps is not None:
    return flag('steps', 2 * config.steps)
  return flag('epochs', f'{2 * config.epochs:g}')


def as_before(changes: Mapping[str, tuple[Any, Any]]) -> str:
  """Flags for the old values of changed settings, see `run_info.config_changes`."""
  return ' '.join(flag(key, old) for key, (old, _) in changes.items() if old != ABSENT)
