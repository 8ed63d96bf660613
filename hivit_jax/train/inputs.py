"""From a config to examples and batches; apart from `build`, so that a benchmark needs no data."""

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from hivit_jax.data import pipeline, sources, transforms
from hivit_jax.errors import UserError
from hivit_jax.train import build
from hivit_jax.train.build import image_size


def open_source(config: ml_collections.ConfigDict, split: str) -> Any:
  """Examples of a split of the config's data set."""
  return sources.open_source(config.data.name, split, config.data.data_dir)


def set_num_classes(config: ml_collections.ConfigDict, source: Any) -> None:
  """Settles `config.model.num_classes` by a source; raises UserError if they do not agree."""
  if build.is_pretraining(config):
    return
  count = source.num_classes
  if not count:
    raise UserError(
      f'{source.name} ({source.split}) has no class folders, and config.task="{config.task}" needs '
      'classes: <root>/<split>/<class>/*.jpg; pretraining does without'
    )
  config.model.num_classes = config.model.num_classes or count
  if config.model.num_classes < count:
    raise UserError(
      f'config.model.num_classes={config.model.num_classes}, but {source.name} ({source.split}) '
      f'has {count} classes; --config.model.num_classes=None takes those'
    )


def check_classes(names: Sequence[str], where: str, source: Any) -> None:
  """UserError unless a source has the classes `names`, in their order."""
  if list(names) != list(source.class_names):
    other = sorted(set(names) ^ set(source.class_names)) or ['their order']
    raise UserError(
      f'{source.name} ({source.split}) has other classes than {where}; what differs: '
      + ', '.join(other[:6])
    )


def check_labels(source: Any) -> None:
  """UserError for a split without labels, such as ImageNet's test images."""
  if source[0]['label'] < 0:
    raise UserError(
      f'{source.name} ({source.split}) has no labels to learn from; choose another '
      '--config.data.train_split'
    )


def _loader_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  return {
    'process_index': jax.process_index(),
    'process_count': jax.process_count(),
    'channels': config.channels,
    'num_threads': config.data.num_threads or None,
    'num_workers': config.data.num_workers,
    'max_broken_fraction': config.data.max_broken_fraction,
  }


def train_batches(config: ml_collections.ConfigDict, source: Any, start: int, end: int) -> Any:
  """This process's training batches of steps [start, end)."""
  a = config.augment
  transform = transforms.train_transform(
    image_size(config),
    scale=tuple(a.crop_scale),
    ratio=tuple(a.crop_ratio),
    flip=a.flip,
    rand_augment=a.rand_augment,
    color_jitter=a.color_jitter,
    mean=tuple(config.data.mean),
  )
  return pipeline.train_loader(
    source,
    transform,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start,
    num_steps=end - start,
    **_loader_options(config),
  )


def eval_batches(
  config: ml_collections.ConfigDict,
  source: Any,
  batch_size: int,
  *,
  alone: bool = False,
  told: set[str] | None = None,
) -> Any:
  """This process's batches of one pass over a source.

  Args:
    config: see configs/base.py.
    source: the examples.
    batch_size: over all processes.
    alone: all examples, not this process's share.
    told: broken examples that the log has already; see `pipeline.eval_loader`.
  """
  transform = transforms.eval_transform(image_size(config), config.data.eval_crop)
  options = _loader_options(config)
  if alone:
    options |= {'process_index': 0, 'process_count': 1}
  return pipeline.eval_loader(source, transform, batch_size=batch_size, told=told, **options)
