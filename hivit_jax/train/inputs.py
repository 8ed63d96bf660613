"""From a config to examples and batches; apart from `build`, so that a benchmark needs no data."""

from typing import Any

import jax
import ml_collections

from hivit_jax.data import pipeline, sources, transforms
from hivit_jax.errors import UserError
from hivit_jax.train.build import image_size


def open_sources(config: ml_collections.ConfigDict) -> tuple[Any, Any]:
  """Training and evaluation examples."""
  d = config.data
  return tuple(
    sources.open_source(d.name, split, d.data_dir) for split in (d.train_split, d.eval_split)
  )


def set_num_classes(config: ml_collections.ConfigDict, train_source: Any, eval_source: Any) -> None:
  """Settles `config.model.num_classes` by the data; raises UserError where they disagree."""
  if config.task == 'mae':
    return
  count = train_source.num_classes
  config.model.num_classes = config.model.num_classes or count
  if config.model.num_classes < count:
    raise UserError(
      f'config.model.num_classes={config.model.num_classes}, but {train_source.name} '
      f'({train_source.split}) has {count} classes; leave it out to take those'
    )
  if train_source.class_names != eval_source.class_names:
    both = set(train_source.class_names) ^ set(eval_source.class_names)
    raise UserError(
      f'{train_source.name} has other classes in {train_source.split} than in {eval_source.split}: '
      f'{", ".join(sorted(both)[:6])}'
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
  config: ml_collections.ConfigDict, source: Any, batch_size: int, *, alone: bool = False
) -> Any:
  """This process's batches of one pass over a source; `alone`: all of it, not this host's share."""
  transform = transforms.eval_transform(image_size(config), config.data.eval_crop)
  options = _loader_options(config)
  if alone:
    options |= {'process_index': 0, 'process_count': 1}
  return pipeline.eval_loader(source, transform, batch_size=batch_size, **options)
