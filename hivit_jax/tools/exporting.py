"""A model's forward pass as a function for `jax.export`; `tools.export` writes it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import errors, export

from hivit_jax.errors import UserError
from hivit_jax.interop import torch_names

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


@dataclasses.dataclass(frozen=True)
class Forward:
  """What is exported.

  Attributes:
    function: (model, *inputs) -> output.
    inputs: name -> shape, with names for the sizes that stay open, and dtype.
  """

  function: Callable[..., Any]
  inputs: Mapping[str, tuple[tuple[str | int, ...], str]]


def forward(model: Any, output: str) -> Forward:
  """The forward pass of a model that gives an output.

  Args:
    model: from `create_model` with `ops='plain'`.
    output: 'prediction', 'pooled', 'tokens' or 'kept'.

  Raises:
    UserError: the model has no such output.
  """
  height, width = model.image_size
  images = {'images': (('b', height, width, model.channels), 'float32')}
  if output == 'prediction' and hasattr(model, 'masking_noise'):
    units = model.grid[0] * model.grid[1]
    return Forward(_reconstruction, images | {'noise': (('b', units), 'float32')})
  if output == 'prediction':
    if hasattr(model, 'detect'):
      raise UserError('detectors are not exported: each of their images has its own size')
    return Forward(lambda model, images: model(images), images)
  if not hasattr(model, 'forward_features'):
    raise UserError(f'--output={output}: {type(model).__name__} only has --output=prediction')
  if output == 'kept':
    return Forward(
      lambda model, images, ids: model.forward_features(images, ids),
      images | {'ids': (('b', 'k'), 'int32')},
    )
  method = 'pooled' if output == 'pooled' else 'forward_features'
  return Forward(lambda model, images: getattr(model, method)(images), images)


def _reconstruction(model: Any, images: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
  out = model(images, noise=noise)
  return {'loss': out.loss, 'pred': out.pred, 'mask': out.mask}


def exported(
  model: nnx.Module, what: Forward, platforms: list[str], *, beside: bool = False
) -> tuple[export.Exported, dict[str, np.ndarray]]:
  """The function for `jax.export`, and the weights that it takes as its first argument.

  Args:
    model: from `create_model` with `ops='plain'`.
    what: from `forward`.
    platforms: of `PLATFORMS`.
    beside: whether weights are an argument, a dict by name; else they are part of the function.

  Raises:
    UserError: something in the model depends on how many images or units there are.
  """
  graphdef, state = nnx.split(model)
  weights = {
    '.'.join(path): np.asarray(value)
    for path, value in torch_names.flatten(nnx.to_pure_dict(state)).items()
  }

  def call(weights, *inputs):
    params = torch_names.unflatten({tuple(k.split('.')): v for k, v in weights.items()})
    return what.function(nnx.merge(graphdef, params), *inputs)

  scope = export.SymbolicScope()
  inputs = [
    jax.ShapeDtypeStruct(export.symbolic_shape(', '.join(map(str, shape)), scope=scope), dtype)
    for shape, dtype in what.inputs.values()
  ]
  try:
    if beside:
      abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in weights.items()}
      return export.export(jax.jit(call), platforms=platforms)(abstract, *inputs), weights
    constants = {name: jnp.asarray(value) for name, value in weights.items()}
    alone = jax.jit(lambda *inputs: call(constants, *inputs))
    return export.export(alone, platforms=platforms)(*inputs), {}
  except errors.InconclusiveDimensionOperation as error:
    reason = next(iter(str(error).splitlines()), '')
    raise UserError(
      f'{type(model).__name__} cannot be exported with this output for any batch: {reason}'
    ) from error
