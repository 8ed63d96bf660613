"""Weights from anywhere: PyTorch and safetensors files, checkpoints and workdirs of this package.

It stands here and not in `interop` because checkpoints are the training loop's; `interop` knows
PyTorch's files and models only.
"""

import os
import pathlib
from typing import Any

from flax import nnx

from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, exporter, files, importer
from hivit_jax.train import manifest
from hivit_jax.train.checkpoint import load_params

_EMA_KEY = 'ema'  # of the training state


def read(path: str | os.PathLike[str], *, ema: bool = False) -> files.StateDict:
  """Reads weights under their PyTorch names.

  Args:
    path: a `.pth` or `.safetensors` file, a workdir, its `best`, or one of its checkpoints.
    ema: the exponential moving average of the weights instead of the weights.

  Raises:
    UserError: there is nothing, it is damaged, or it has no averaged weights.
  """
  if not isinstance(path, str | os.PathLike) or not str(path):
    raise UserError(
      f'weights={path!r}: expected the path of a .pth or .safetensors file, a checkpoint or a '
      'workdir'
    )
  path = pathlib.Path(path).expanduser()
  if path.is_dir() or manifest.names_best(path):
    restored = load_params(path, key=_EMA_KEY if ema else 'params')
    source = f'step {restored.step} of {path}'
    return files.StateDict(exporter.named_arrays(restored.state), source, restored.metadata)
  if path.exists() or files.is_weight_file(path):
    return files.read(path, ema=ema)
  raise UserError(
    f'{path} does not exist; give a .pth or .safetensors file, a checkpoint or a workdir'
  )


def create_model(
  name: str | None,
  path: str | os.PathLike[str],
  *,
  seed: int = 0,
  attention: str = 'xla',
  partial: bool = False,
  ema: bool = False,
  **overrides: Any,
) -> nnx.Module:
  """Builds a model with weights from a path; arguments as for `hivit_jax.create_model`."""
  state = read(path, ema=ema)
  told = carried.read(state.metadata)
  if name is None or (told and told.name == name):
    name, overrides, _ = carried.model_of(state, **overrides)

  def create():
    return models.create_model(name, seed=seed, attention=attention, **overrides)

  # Whatever is loaded need not be initialised before.
  model = create() if partial else nnx.eval_shape(create)
  importer.load_into(model, state, partial=partial)
  return model


def load_weights(
  model: nnx.Module,
  path: str | os.PathLike[str],
  *,
  partial: bool = False,
  ema: bool = False,
  image_size: tuple[int, int] | None = None,
) -> importer.LoadReport:
  """Loads weights into a model, in place.

  Position embeddings and relative position bias tables are resized when the model's image size is
  another one; the log says so.

  Args:
    model: from `create_model`.
    path: a `.pth` or `.safetensors` file, a workdir, or one of its checkpoints.
    partial: take what fits, where a head or decoder is on one side only: pretrained encoders into
      classifiers. The encoder must be complete, with or without relative position bias.
    ema: the exponential moving average of the weights instead of the weights.
    image_size: (height, width) that the weights are for; needed only where that was not square
      and the file does not tell.

  Returns:
    What was loaded, resized, dropped, and what stays new.

  Raises:
    UserError: the weights cannot be read or do not fit; lists the names and the likely cause.
  """
  return importer.load_into(model, read(path, ema=ema), partial=partial, image_size=image_size)
