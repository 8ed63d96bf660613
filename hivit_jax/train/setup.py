"""What training and evaluation start from: the final config, its devices and its data."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from jax.sharding import Mesh
from ml_collections import config_dict

from hivit_jax import settings
from hivit_jax.data.loader import PREFETCH
from hivit_jax.errors import UserError
from hivit_jax.interop import files
from hivit_jax.runtime import distributed, memory
from hivit_jax.tasks import Task
from hivit_jax.train import assemble, inputs, sharding, validate
from hivit_jax.train.steps import Steps


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a config names, opened.

  Attributes:
    config: checked, and complete by what is known of the data; nobody can write to it.
    mesh: the devices.
    task: what is trained or evaluated.
    train_source: examples to learn from, and the bank of the k-NN accuracy; None: not needed.
    sets: evaluation sets by the beginning of their metrics: 'eval', and 'eval_NAME' for each of
      `config.evaluation.more`.
    class_sets: the same with labels of the model's classes; empty for a model without classes.
  """

  config: config_dict.FrozenConfigDict
  mesh: Mesh
  task: Task
  train_source: Any
  sets: Mapping[str, Any]
  class_sets: Mapping[str, Any]
  # Broken images: each is named once.
  _told: set[str] = dataclasses.field(default_factory=set, init=False)

  @property
  def eval_source(self) -> Any:
    """The first of the evaluation sets."""
    return self.sets['eval']

  @property
  def steps(self) -> Steps:
    """Epochs as steps; without training examples, of the evaluation set."""
    source = self.eval_source if self.train_source is None else self.train_source
    return Steps(len(source), self.config.batch_size)

  def eval_batches(
    self, source: Any, transform: Callable[..., Any] | None = None, *, alone: bool = False
  ) -> Any:
    """This process's batches of one pass over a source.

    Args:
      source: the examples.
      transform: of an example; None: the task's of evaluation.
      alone: all examples as one batch.
    """
    size = len(source) if alone else self.config.evaluation.batch_size
    transform = transform or self.task.input(train=False)
    order = None if alone else self.task.eval_order(source, size)
    return inputs.eval_batches(
      self.config, source, transform, size, order=order, alone=alone, told=self._told
    )

  def train_batches(self, start: int, end: int) -> Any:
    """This process's training batches of steps [start, end)."""
    source, task = self.train_source, self.task
    order = task.order(source, self.config.seed, self.config.batch_size)
    return inputs.train_batches(self.config, source, task.input(train=True), order, start, end)


def set_up(config: ml_collections.ConfigDict, evaluated: files.StateDict | None = None) -> Setup:
  """Finds the devices, opens the data sets, and checks that they fit together.

  Args:
    config: from `validate.checked`; it stays as it is.
    evaluated: weights that are to be evaluated and not trained.

  Raises:
    UserError: a setting or a data set that does not fit.
  """
  config = config.copy_and_resolve_references()
  training = evaluated is None
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  if training:
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    _check_images(config, mesh, 'batch_size')
  if config.evaluation.every_epochs or config.knn.every_epochs or config.rankme.every_epochs:
    key = 'evaluation.batch_size'
    sharding.check_batch_size(config.evaluation.batch_size, mesh, key=key)
    _check_images(config, mesh, key)
  assemble.check_model(config)
  chosen = assemble.task_class(config)
  knn = config.knn.every_epochs and 'knn' in chosen.measures
  train_source: Any = None
  with distributed.primary_first():  # embedded data sets are prepared
    if training or knn:
      train_source = inputs.open_source(config, config.data.train_split, 'data.train_split')
      if training and chosen.object_classes:
        train_source = inputs.with_objects(train_source)
    evaluated_on = inputs.open_source(config, config.data.eval_split, 'data.eval_split')
    sets = {'eval': evaluated_on} | _more_sets(config)
  class_sets = {}
  if chosen.pixel_classes or chosen.object_classes:
    if evaluated is None:
      config.model.num_classes = inputs.pixel_classes(config, train_source)
      names, where = train_source.class_names, config.data.train_split
    else:
      names, where = evaluated.metadata.get('class_names'), evaluated.source
    if names:
      for name, source in sets.items():
        inputs.check_classes(names, where, source, name)
  if chosen.needs_classes:
    if evaluated is None:
      class_sets = _trained_classes(config, train_source, sets)
    elif has_head(evaluated) and config.evaluation.every_epochs:
      class_sets = _classes_of_weights(config, evaluated, sets)
  if knn and train_source.class_names:
    sets = _with_classes_of(train_source, sets)
  frozen = config_dict.FrozenConfigDict(config)
  task = assemble.task(frozen, functools.partial(_transform, frozen))
  return Setup(frozen, mesh, task, train_source, sets, class_sets)


def has_head(weights: files.StateDict) -> bool:
  """Whether weights have a last layer, which gives classes."""
  return 'head.weight' in weights.arrays


def _more_sets(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The sets of `config.evaluation.more`, opened."""
  return {
    f'eval_{name}': inputs.open_source(config, split, 'evaluation.more', data)
    for name, (data, split) in validate.further_sets(config).items()
  }


def _trained_classes(
  config: ml_collections.ConfigDict, train_source: Any, sets: Mapping[str, Any]
) -> dict[str, Any]:
  """Evaluation sets with the training examples' classes, whose number goes into the config."""
  config.model.num_classes = inputs.num_classes(config, train_source)
  inputs.check_classes(train_source.class_names, config.data.train_split, sets['eval'])
  inputs.check_labels(train_source)
  return _with_classes_of(train_source, sets)


def _with_classes_of(source: Any, sets: Mapping[str, Any]) -> dict[str, Any]:
  """Evaluation sets with the classes of a source."""
  names, where = source.class_names, f'{source.name} ({source.split})'
  return {
    key: inputs.with_classes_of(names, len(names), where, own, key) for key, own in sets.items()
  }


def _classes_of_weights(
  config: ml_collections.ConfigDict, weights: files.StateDict, sets: Mapping[str, Any]
) -> dict[str, Any]:
  """Evaluation sets with the classes of weights, whose number goes into the config."""
  names, count = weights.metadata.get('class_names'), len(weights.arrays['head.weight'])
  found = {
    key: inputs.with_classes_of(names, count, weights.source, source, key)
    for key, source in sets.items()
  }
  config.model.num_classes = inputs.num_classes(config, found['eval'])
  return found


def _transform(config: config_dict.FrozenConfigDict, train: bool, **options: Any) -> Any:
  """The transform that the config describes, with what the task adds to it."""
  make = inputs.train_transform if train else inputs.eval_transform
  return make(config, **options)


def _check_images(config: ml_collections.ConfigDict, mesh: Mesh, key: str) -> None:
  size = settings.get(config, key)
  memory.check_images(
    mesh,
    config.image_size,
    config.channels,
    size,
    key,
    prefetched=PREFETCH,
    dtype=config.data.dtype,
  )


def check_name(path: str) -> None:
  """UserError if files there could not be written for the letters in their names."""
  if not path.isascii() and sys.getfilesystemencoding() != 'utf-8':  # Orbax's are always UTF-8
    raise UserError(
      f'{path} cannot be written: file names are {sys.getfilesystemencoding()} here; start with '
      'PYTHONUTF8=1 in the environment, or choose another --workdir'
    )
