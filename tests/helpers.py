"""What several test files share."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.interop import torch_names

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def load_golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
  """Constructor arguments and arrays of a golden file."""
  with np.load(GOLDEN / name) as file:
    arrays = {key: file[key] for key in file.files}
  return json.loads(str(arrays.pop('config'))), arrays


def set_params(model: nnx.Module, arrays: dict[str, np.ndarray], unused: set[str] = frozenset()):
  """Overwrites every parameter with `param/<torch name>`; both sides must match completely."""
  given = {k.removeprefix('param/'): v for k, v in arrays.items() if k.startswith('param/')}
  flat = torch_names.flatten(nnx.to_pure_dict(nnx.state(model)))
  new = {}
  for path, value in flat.items():
    name, _ = torch_names.to_torch(path, np.asarray(value))
    new[path] = jnp.asarray(torch_names.from_torch(path, given.pop(name)))
    assert new[path].shape == value.shape, name
  assert set(given) == set(unused), given.keys()
  state = nnx.state(model)
  nnx.replace_by_pure_dict(state, torch_names.unflatten(new))
  nnx.update(model, state)


def torch_gradients(grads) -> dict[str, np.ndarray]:
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
