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
from hivit_jax.interop import carried, exporter, files, hub, importer, layer_scale, pretrained
from hivit_jax.interop.report import LoadReport
from hivit_jax.train import manifest, places
from hivit_jax.train.checkpoint import load_params

LOCAL = 'local-dir:'  # before a directory where a model's name is expected, as timm has it
_EMA_KEY = 'ema'  # of the training state


def read(path: str | os.PathLike[str], *, ema: bool = False) -> files.StateDict:
  """Reads weights under their PyTorch names.

  Args:
    path: a `.pth` or `.safetensors` file, a workdir, its `best`, one of its checkpoints, a
      directory of `hivit_jax.save_pretrained`, or `hf-hub:OWNER/NAME[@REVISION]`.
    ema: the exponential moving average of the weights instead of the weights.

  Raises:
    UserError: there is nothing, it is damaged, or it has no averaged weights.
  """
  if not isinstance(path, str | os.PathLike) or not str(path):
    raise UserError(
      f'weights={path!r}: expected the path of a .pth or .safetensors file, a checkpoint or a '
      'workdir'
    )
  if hub.is_name(path):
    return hub.read(str(path), ema=ema)
  given, path = path, pathlib.Path(places.local(str(path).removeprefix(LOCAL))).expanduser()
  if pretrained.holds(path):
    return pretrained.read(path, ema=ema)
  if path.is_dir() or manifest.names_best(path):
    restored = load_params(path, key=_EMA_KEY if ema else 'params')
    source = f'step {restored.step} of {given if places.is_address(given) else path}'
    metadata = {**restored.metadata, 'step': restored.step}
    return files.StateDict(exporter.named_arrays(restored.state), source, metadata)
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
  fold_layer_scale: bool = False,
  init_channels: str = 'repeat',
  **overrides: Any,
) -> nnx.Module:
  """Builds a model with weights from a path; arguments as for `hivit_jax.create_model`."""
  state = read(path, ema=ema)
  if fold_layer_scale:
    state = layer_scale.folded(state)
  told = carried.read(state.metadata)
  if name is None or (told and told.name == name):
    described = carried.model_of(state, **overrides)
    if 'num_classes' in overrides:
      described = carried.as_classifier(described)
    name, overrides, _ = described

  def create():
    return models.create_model(name, seed=seed, attention=attention, **overrides)

  return importer.load_new(create, state, partial=partial, init_channels=init_channels)[0]


def load_weights(
  model: nnx.Module,
  path: str | os.PathLike[str],
  *,
  partial: bool = False,
  ema: bool = False,
  fold_layer_scale: bool = False,
  image_size: tuple[int, int] | None = None,
  init_channels: str = 'repeat',
) -> LoadReport:
  """Loads weights into a model, in place.

  Position embeddings and relative position bias tables are resized if the model has another image
  size; the log says so.

  Args:
    model: from `create_model`.
    path: a `.pth` or `.safetensors` file, a workdir, or one of its checkpoints.
    partial: take what fits, where a head or decoder is on one side only: pretrained autoencoders
      into classifiers. The encoder must be complete, with or without relative position bias. A file
      of an encoder alone loads into everything without it: heads and decoders are new.
    ema: the exponential moving average of the weights instead of the weights.
    fold_layer_scale: make the scales of residual branches (LayerScale: iTPN-CLIP, Fast-iTPN) part
      of the products before them, for a model of `layer_scale=None`; for inference only.
    image_size: (height, width) that the weights are for; needed only if it was not square and the
      file does not say.
    init_channels: how weights for RGB images start a model for other channels: repeat, mean or
      copy, see `interop.channels`.

  Returns:
    What was loaded, resized, dropped, and what is new.

  Raises:
    UserError: the weights cannot be read or do not fit; lists the names and the likely cause.
  """
  state = read(path, ema=ema)
  if fold_layer_scale:
    state = layer_scale.folded(state)
  return importer.load_into(
    model, state, partial=partial, image_size=image_size, init_channels=init_channels
  )
