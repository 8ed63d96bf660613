"""What training and evaluation begin with: a config that is final, its devices and its data."""

import dataclasses
import sys
from typing import Any

import ml_collections
from jax.sharding import Mesh
from ml_collections import config_dict

from hivit_jax import settings
from hivit_jax.data.loader import PREFETCH
from hivit_jax.errors import UserError
from hivit_jax.interop import files, infer
from hivit_jax.runtime import distributed, memory
from hivit_jax.train import assemble, inputs, sharding


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a config names, opened.

  Attributes:
    config: checked, and complete by what is known of the data; nobody can write to it.
    mesh: the devices.
    train_source: examples to learn from, and the bank of the k-NN accuracy; None: of no use here.
    eval_source: examples to evaluate on.
    labelled_source: the same with labels of the model's classes; None for a model without classes.
  """

  config: config_dict.FrozenConfigDict
  mesh: Mesh
  train_source: Any
  eval_source: Any
  labelled_source: Any
  # Broken images: each is named once.
  _told: set[str] = dataclasses.field(default_factory=set, init=False)

  @property
  def steps(self) -> assemble.Steps:
    """Epochs as steps; without training examples, of the evaluation set."""
    source = self.eval_source if self.train_source is None else self.train_source
    return assemble.Steps(len(source), self.config.batch_size)

  def eval_batches(self, source: Any) -> Any:
    """This process's batches of one pass over a source."""
    size, transform = self.config.evaluation.batch_size, inputs.eval_transform(self.config)
    return inputs.eval_batches(self.config, source, transform, size, told=self._told)


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
  if config.evaluation.every_epochs or config.knn.every_epochs:
    key = 'evaluation.batch_size'
    sharding.check_batch_size(config.evaluation.batch_size, mesh, key=key)
    _check_images(config, mesh, key)
  assemble.check_model(config)
  train_source: Any = None
  with distributed.primary_first():  # embedded data sets are prepared
    if training or config.knn.every_epochs:
      train_source = inputs.open_source(config, config.data.train_split)
    eval_source = inputs.open_source(config, config.data.eval_split)
  labelled_source: Any = None
  if not assemble.is_pretraining(config):
    if training:
      config.model.num_classes = inputs.num_classes(config, train_source)
      inputs.check_classes(train_source.class_names, config.data.train_split, eval_source)
      inputs.check_labels(train_source)
      labelled_source = eval_source
    elif infer.family(evaluated.arrays) != 'backbone' and config.evaluation.every_epochs:
      labelled_source = inputs.with_classes_of(
        evaluated.metadata.get('class_names'),
        len(evaluated.arrays['head.weight']),
        evaluated.source,
        eval_source,
      )
      config.model.num_classes = inputs.num_classes(config, labelled_source)
  frozen = config_dict.FrozenConfigDict(config)
  return Setup(frozen, mesh, train_source, eval_source, labelled_source)


def _check_images(config: ml_collections.ConfigDict, mesh: Mesh, key: str) -> None:
  size = settings.get(config, key)
  memory.check_images(mesh, config.image_size, config.channels, size, key, prefetched=PREFETCH)


def check_local(path: str) -> None:
  """UserError for the address of a bucket."""
  if '://' in path:
    raise UserError(
      f'{path} is no path in the file system; mount the bucket (gcsfuse, s3fs) and give the path '
      'where it is mounted, or take a local disk or NFS'
    )
  if not path.isascii() and sys.getfilesystemencoding() != 'utf-8':  # Orbax's are always UTF-8
    raise UserError(
      f'{path} cannot be written: file names are {sys.getfilesystemencoding()} here; start with '
      'PYTHONUTF8=1 in the environment, or choose another --workdir'
    )
