"""From a config to examples and batches; not in `assemble`, so that a benchmark needs no data."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from hivit_jax.data import loader, transforms
from hivit_jax.data.cores import Crew, crew, usable_cores
from hivit_jax.data.order import Order, Pass
from hivit_jax.data.sources import base
from hivit_jax.data.sources.relabelled import Relabelled
from hivit_jax.data.sources.splits import SplitError
from hivit_jax.data.sources.subset import Subset
from hivit_jax.errors import UserError
from hivit_jax.tasks.evaluators import setting_of
from hivit_jax.train.assemble import image_size

_log = logging.getLogger(__name__)

_IMAGENET_CLASSES = 1000
_SYNSET = re.compile(r'n\d{8}')  # a class of ImageNet, as folders and TFDS name it
_SHOWN = 6  # names in a message


def open_source(
  config: ml_collections.ConfigDict, split: str, setting: str, name: str | None = None
) -> Any:
  """Examples of a split of the config's data set, or of another one.

  Args:
    config: the run's.
    split: which examples.
    setting: that says so, for an error.
    name: of the other data set.
  """
  try:
    return base.open_source(name or config.data.name, split, config.data.data_dir)
  except SplitError as error:
    raise UserError(f'config.{setting}: {error}') from None


def with_objects(source: Any) -> Any:
  """The examples of a source that have an object to learn from, as far as that is known."""
  scenes = getattr(source, 'scenes', None)
  if scenes is None or scenes[:, 2].all():
    return source
  kept = np.flatnonzero(scenes[:, 2])
  if not len(kept):
    raise UserError(f'{source.name} ({source.split}) has no object to learn from')
  _log.info(
    '%d of %d images of %s (%s) have no object to learn from and are left out',
    len(source) - len(kept), len(source), source.name, source.split,
  )  # fmt: skip
  return Subset(source, kept)


def num_classes(config: ml_collections.ConfigDict, source: Any) -> int:
  """`config.model.num_classes`, or without it a source's; UserError if the source has more."""
  count = source.num_classes
  if not count:
    raise UserError(
      f'{source.name} ({source.split}) has no class folders, and config.task="{config.task}" needs '
      'classes: <root>/<split>/<class>/*.jpg; pretraining does not need them'
    )
  settled = config.model.num_classes or count
  if settled < count:
    raise UserError(
      f'config.model.num_classes={settled}, but {source.name} ({source.split}) has {count} '
      'classes; --config.model.num_classes=None uses that number'
    )
  return settled


def pixel_classes(config: ml_collections.ConfigDict, source: Any) -> int:
  """As `num_classes`, of a source with label maps or objects."""
  count, settled = len(source.class_names), config.model.num_classes
  if not (count or settled):
    raise UserError(
      f'{source.name} ({source.split}) has no names of classes; how many there are: '
      '--config.model.num_classes=N'
    )
  if settled and count and settled != count:
    raise UserError(
      f'config.model.num_classes={settled}, but {source.name} ({source.split}) has {count} '
      'classes; --config.model.num_classes=None takes those'
    )
  return settled or count


def check_classes(names: Sequence[str], where: str, source: Any, name: str = 'eval') -> None:
  """UserError unless a source has the classes `names`, in their order; see `with_classes_of`."""
  if list(names) != list(source.class_names):
    raise _other_classes(names, where, source, name)


def with_classes_of(
  names: Sequence[str] | None, count: int, where: str, source: Any, name: str = 'eval'
) -> Any:
  """A source whose labels are the classes of a model.

  Classes of the source are found among those of the model by name: a part of them is enough, in
  any order. Weights of 1000 classes without names are taken for ImageNet's if the source has
  ImageNet's synsets (n01440764, ...) for names.

  Args:
    names: of the model's classes; None or empty: not known.
    count: of the model's classes.
    where: whose classes they are, for messages.
    source: examples to evaluate on.
    name: of this evaluation set, as in `Setup.sets`: it tells which setting is at fault.

  Returns:
    `source`, relabelled if needed.

  Raises:
    UserError: the model does not have the source's classes, as far as can be known.
  """
  own = source.class_names
  if not own:
    raise UserError(
      f'{source.name} ({source.split}) has no class folders to compare predictions with '
      f'(<root>/<split>/<class>/*.jpg); choose another {setting_of(name)}'
    )
  if not names and count == _IMAGENET_CLASSES and all(map(_SYNSET.fullmatch, own)):
    # Here: TFDS is slow to import.
    from hivit_jax.data.builders import imagenet_files

    names = imagenet_files.synsets()
  if not names:
    if count != len(own):
      raise UserError(
        f'{where} has {count} classes without names, and {source.name} ({source.split}) has '
        f'{len(own)}: they cannot be matched; choose the data it was trained on '
        f'({_settings_of(name)}), or finetune it on these (configs/finetune_hivit_b.py, '
        '--config.init)'
      )
    _log.warning(
      '%s has no class names: assuming its %d classes are the %d of %s (%s), in the same order',
      where, count, len(own), source.name, source.split,
    )  # fmt: skip
    return source
  if list(names) == list(own):
    return source
  index = {name: i for i, name in enumerate(names)}
  if not all(name in index for name in own):
    raise _other_classes(names, where, source, name)
  _log.info(
    'the %d classes of %s (%s) were found by name among the %d of %s; predictions are over all %d',
    len(own), source.name, source.split, len(names), where, count,
  )  # fmt: skip
  return Relabelled(source, [index[name] for name in own], names)


def _settings_of(name: str) -> str:
  return '--config.data.name, --config.data.eval_split' if name == 'eval' else setting_of(name)


def _other_classes(names: Sequence[str], where: str, source: Any, name: str) -> UserError:
  differ = sorted(set(names) ^ set(source.class_names)) or ['their order']
  more = f', and {len(differ) - _SHOWN} more' if len(differ) > _SHOWN else ''
  return UserError(
    f'{source.name} ({source.split}) has other classes ({len(source.class_names)}) than {where} '
    f'({len(names)}); what differs: {", ".join(differ[:_SHOWN])}{more}; choose data with the same '
    f'classes ({_settings_of(name)}), or finetune for these (--config.init)'
  )


def check_labels(source: Any) -> None:
  """UserError for a split without labels, such as ImageNet's test images."""
  if source[0].get('label', -1) < 0:
    raise UserError(
      f'{source.name} ({source.split}) has no labels to learn from; choose another '
      '--config.data.train_split'
    )


def _loader_options(config: ml_collections.ConfigDict, loaded_by: Crew) -> dict[str, Any]:
  return {
    'process_index': jax.process_index(),
    'process_count': jax.process_count(),
    'num_threads': loaded_by.threads,
    'num_workers': loaded_by.workers,
    'max_broken_fraction': config.data.max_broken_fraction,
  }


def train_transform(config: ml_collections.ConfigDict, **options: Any) -> transforms.TrainTransform:
  """The augmentation of single examples; the rest happens on the device.

  Args:
    config: see configs/base.py.
    **options: of `transforms.train_transform` that a task decides on, such as `keys`.
  """
  a = config.augment
  return transforms.train_transform(
    image_size(config),
    channels=config.channels,
    dtype=config.data.dtype,
    scale=tuple(a.crop_scale),
    ratio=tuple(a.crop_ratio),
    clamp=a.crop_clamp,
    interpolation=a.interpolation,
    flip=a.flip,
    rand_augment=a.rand_augment,
    color_jitter=a.color_jitter,
    mean=tuple(config.data.mean),
    reduce_jpegs=config.data.reduce_jpegs,
    **options,
  )


def eval_transform(config: ml_collections.ConfigDict, **options: Any) -> transforms.EvalTransform:
  """What an example is evaluated as.

  Args:
    config: see configs/base.py.
    **options: of `transforms.eval_transform` that a task decides on, such as `keys`.
  """
  size, crop = image_size(config), config.data.eval_crop
  return transforms.eval_transform(
    size, crop, channels=config.channels, dtype=config.data.dtype, **options
  )


def train_batches(
  config: ml_collections.ConfigDict,
  source: Any,
  transform: Callable[..., Mapping[str, Any]],
  order: Order | None,
  start: int,
  end: int,
) -> loader.Loader:
  """This process's training batches of steps [start, end).

  Args:
    config: see configs/base.py.
    source: the examples.
    transform: of training, see `loader.train_loader`.
    order: of the examples; None: a permutation an epoch.
    start: first step.
    end: step after the last one.
  """
  cores, devices = usable_cores(), jax.local_device_count()
  loaded_by = crew(cores, devices, config.data.num_threads, config.data.num_workers)
  _log.info('data is loaded by %s (cores: %d, devices: %d)', loaded_by, cores, devices)
  return loader.train_loader(
    source,
    transform,
    batch_size=config.batch_size,
    seed=config.seed,
    order=order,
    start_step=start,
    num_steps=end - start,
    **_loader_options(config, loaded_by),
  )


def eval_batches(
  config: ml_collections.ConfigDict,
  source: Any,
  transform: Callable[[dict[str, Any]], Mapping[str, Any]],
  batch_size: int,
  *,
  order: Pass | None = None,
  alone: bool = False,
  told: set[str] | None = None,
) -> loader.Loader:
  """This process's batches of one pass over a source.

  Args:
    config: see configs/base.py.
    source: the examples.
    transform: of evaluation, see `loader.eval_loader`.
    batch_size: over all processes.
    order: of the examples; None: that of the source.
    alone: all examples, not this process's share.
    told: broken examples that the log has already; see `loader.eval_loader`.
  """
  # Processes take longer to start than threads need for most evaluations.
  workers = config.data.num_workers or 0
  loaded_by = crew(usable_cores(), jax.local_device_count(), config.data.num_threads, workers)
  options = _loader_options(config, loaded_by)
  if alone:
    options |= {'process_index': 0, 'process_count': 1}
  options |= {'order': order, 'told': told}
  return loader.eval_loader(source, transform, batch_size=batch_size, **options)
