"""Size and work of a model, without computing anything."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax import models
from hivit_jax.planning.flops import matmul_flops, matmul_outputs


def forward(name: str, **overrides: Any) -> tuple[Any, tuple[Any, ...]]:
  """A model's work on one image: a function of its parameters and inputs, and their shapes."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: models.create_model(name, **overrides)))
  model: Any = nnx.merge(graphdef, params)
  image = jax.ShapeDtypeStruct((1, *model.image_size, model.channels), jnp.float32)
  if hasattr(model, 'masking_noise'):
    noise = jax.eval_shape(lambda: model.masking_noise(jax.random.key(0), 1))
    return lambda p, x, noise: nnx.merge(graphdef, p)(x, noise=noise).loss, (params, image, noise)
  return lambda p, x: nnx.merge(graphdef, p)(x), (params, image)


def summary(name: str, **overrides: Any) -> dict[str, Any]:
  """Numbers of a model for one image.

  Args:
    name: see `hivit_jax.list_models()`.
    **overrides: arguments of `create_model`, such as `image_size`.

  Returns:
    `parameters`; `gmacs`, 1e9 multiply-adds in matrix products; `activations_m`, 1e6 elements of
    their results.
  """
  function, args = forward(name, **overrides)
  return {
    'model': name,
    'image_size': list(args[1].shape[1:3]),
    'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(args[0])),
    'gmacs': matmul_flops(function, *args) / 2e9,
    'activations_m': matmul_outputs(function, *args) / 1e6,
  }


def format_table(rows: list[dict[str, Any]]) -> str:
  """The rows as Markdown."""
  lines = ['| model | image | parameters | GMACs | activations, M |', '|---|---|---:|---:|---:|']
  lines += [
    f'| {r["model"]} | {r["image_size"][0]}x{r["image_size"][1]} | {r["parameters"]:,} '
    f'| {r["gmacs"]:.2f} | {r["activations_m"]:.1f} |'
    for r in rows
  ]
  return '\n'.join(lines)
