"""What several test files share."""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

import hivit_jax
from hivit_jax.interop import torch_names

GOLDEN = pathlib.Path(__file__).parent / 'golden'

# The smallest models in which nothing is trivial: several blocks, heads and units.
TINY = {'image_size': 64, 'embed_dim': 32, 'depths': (1, 1, 2), 'num_heads': 4}
TINY_VIT = {'image_size': (32, 32), 'embed_dim': 64, 'depth': 1, 'num_heads': 1}
TINY_SWIN = {
  'image_size': (32, 32), 'embed_dim': 8, 'depths': (2, 1), 'num_heads': (1, 2), 'window_size': 4
}  # fmt: skip
TINY_MAE = TINY | {'decoder_embed_dim': 16, 'decoder_depth': 2, 'decoder_num_heads': 2}


@contextlib.contextmanager
def optimized() -> Iterator[None]:
  """Compiles inside the block with most optimisations, as for users."""
  jax.clear_caches()  # what is compiled already is not compiled again: no key has the setting
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', True)


def marks_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
  """Marks for a test that needs a model's published shapes: `slow` unless the model is tiny."""
  return () if 'tiny' in name else (pytest.mark.slow,)


@functools.cache
def abstract_model(name: str, **overrides: Any) -> tuple[nnx.GraphDef, dict]:
  """A model's static half and its parameters' shapes; computes nothing."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: hivit_jax.create_model(name, **overrides)))
  return graphdef, nnx.to_pure_dict(params)


def random_model(name: str, *, seed: int = 0, **overrides: Any) -> tuple[nnx.GraphDef, dict]:
  """A model's static half and parameters of which none is zero, one, or negligible."""
  graphdef, abstract = abstract_model(name, **overrides)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = rng.standard_normal(leaf.shape, np.float32)
    if path[-1].key == 'kernel':
      return jnp.asarray(values / np.float32(math.sqrt(math.prod(leaf.shape[:-1]))))
    if path[-1].key == 'var':
      return jnp.asarray(np.abs(values) + np.float32(0.5))
    return jnp.asarray(np.float32(0.2) * values + (path[-1].key == 'scale'))

  return graphdef, jax.tree_util.tree_map_with_path(draw, abstract)


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
  """Normalised images (B, H, W, C) of noise."""
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def load_golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
  """Constructor arguments and arrays of a golden file."""
  with np.load(GOLDEN / name) as file:
    arrays = {key: file[key] for key in file.files}
  config = json.loads(str(arrays.pop('config')))
  return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}, arrays


def golden_params(abstract: dict, arrays: dict[str, np.ndarray], unused: set[str]) -> dict:
  """Parameters from `param/<torch name>`; both sides must match completely, `unused` aside."""
  given = {k.removeprefix('param/'): v for k, v in arrays.items() if k.startswith('param/')}
  flat = {}
  for path, leaf in torch_names.flatten(abstract).items():
    name, _ = torch_names.to_torch(path, np.empty(leaf.shape))
    flat[path] = jnp.asarray(torch_names.from_torch(path, given.pop(name)))
    assert flat[path].shape == leaf.shape, name
  assert set(given) == unused, set(given)
  return torch_names.unflatten(flat)


def torch_gradients(grads: dict) -> dict[str, np.ndarray]:
  """Gradients of a model's pure dict under their torch names."""
  flat = torch_names.flatten(grads)
  return dict(torch_names.to_torch(path, np.asarray(value)) for path, value in flat.items())


def assert_close(actual, expected, *, relative: float = 1e-5, name: str = ''):
  """Largest difference within `relative` of the largest expected magnitude."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
  scale = np.abs(expected).max()
  difference = np.abs(actual - expected).max()
  assert difference <= relative * scale, f'{name}: {difference} apart, magnitudes up to {scale}'


def assert_trees_close(actual, expected, *, relative: float = 1e-5):
  """`assert_close` for every pair of leaves."""
  jax.tree_util.tree_map_with_path(
    lambda path, a, e: assert_close(a, e, relative=relative, name=jax.tree_util.keystr(path)),
    actual,
    expected,
  )


def equations(function: Callable, *args: Any) -> Iterator[core.JaxprEqn]:
  """Every operation of a traced function, those inside loops and calls too."""
  pending = [jax.make_jaxpr(function)(*args).jaxpr]
  while pending:
    for equation in pending.pop().eqns:
      yield equation
      for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda v: isinstance(v, core.ClosedJaxpr)
      ):
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
          pending.append(getattr(value, 'jaxpr', value))
