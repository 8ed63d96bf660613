"""Every fast form of an operation against its definition, as each platform computes it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.ops import choice
from hivit_jax.ops.choice import FAST, PLAIN
from tests.helpers import (
  TINY_MAE,
  TINY_SWIN,
  TINY_VIT,
  assert_close,
  assert_trees_close,
  equations,
  random_images,
  random_model,
)

SOME = np.array([[4, 0, 2], [1, 2, 3]])
ALL = np.array([[4, 0, 2, 1, 3], [0, 1, 3, 4, 2]])


class Case(NamedTuple):
  """Shapes of the activations, which may be bfloat16, of the parameters, which are not; the rest"""

  name: str
  activations: tuple[tuple[int, ...], ...]
  parameters: tuple[tuple[int, ...], ...] = ()
  constants: tuple[Any, ...] = ()


CASES = {
  'linear': Case('linear', ((5, 24),), ((24, 16), (16,))),
  'linear without bias': Case('linear', ((5, 24),), ((24, 16),), (None,)),
  'convolve': Case('convolve', ((2, 5, 6, 4),), ((3, 3, 4, 6),)),
  'layer_norm': Case('layer_norm', ((5, 24),), ((24,), (24,)), (1e-6,)),
  'relative_position_bias': Case('relative_position_bias', (), ((5 * 7, 2),), ((3, 4),)),
  'gather some units': Case('gather_units', ((2, 5, 3, 2),), (), (SOME,)),
  'gather all units': Case('gather_units', ((2, 5, 3, 2),), (), (ALL,)),
  'gather what is shared': Case('gather_shared', (), ((5, 3),), (SOME,)),
  'gather pairs': Case('gather_pairs', (), ((2, 5, 5),), (SOME,)),
}
# Where a platform has a branch of its own; CPUs compute all other forms as the others do.
BRANCHES = {'layer_norm': 'cuda'}


def each(*names: str):
  """Runs a test for cases of these names, on all platforms whose form is not that of CPUs."""
  return pytest.mark.parametrize(
    ('case', 'platform'),
    [
      pytest.param(CASES[name], platform, id=f'{name}, {platform}')
      for name in names
      for platform in ('cpu', BRANCHES.get(CASES[name].name))
      if platform
    ],
  )


def draw(shapes, *leading: int, seed: int = 0) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.standard_normal((*leading, *shape), np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, arrays):
  value, pullback = jax.vjp(function, *arrays)
  weights = np.random.default_rng(9).standard_normal(value.shape, np.float32)
  return value, pullback(jnp.asarray(weights, jnp.bfloat16).astype(value.dtype))


def form(ops: choice.Ops, case: Case):
  return lambda *arrays: getattr(ops, case.name)(*arrays, *map(_on_device, case.constants))


def _on_device(constant):
  return jnp.asarray(constant) if isinstance(constant, np.ndarray) else constant


@pytest.fixture(autouse=True)
def _compute_here_what_others_compute(request, monkeypatch) -> None:
  callspec = getattr(request.node, 'callspec', None)
  if callspec and 'platform' in callspec.params:
    monkeypatch.setattr(
      jax.lax,
      'platform_dependent',
      lambda *args, default, **branches: branches.get(callspec.params['platform'], default)(*args),
    )


def test_every_operation_has_a_case_and_two_forms():
  names = {field.name for field in dataclasses.fields(choice.Ops)}
  names -= {'attend'}  # has one form for XLA; for cuDNN's see test_attention.py
  assert {case.name for case in CASES.values()} == names
  assert [name for name in names if getattr(FAST, name) is getattr(PLAIN, name)] == []


@each(*CASES)
def test_fast_is_plain_in_float32(case, platform):
  arrays = draw(case.activations + case.parameters)
  value, gradients = value_and_gradients(form(FAST, case), arrays)
  expected, expected_gradients = value_and_gradients(form(PLAIN, case), arrays)
  assert_close(value, expected)
  for i, (actual, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
    assert_close(actual, wanted, name=f'gradient {i}')


@each(*CASES)
def test_fast_in_bfloat16_is_plain_rounded(case, platform):
  activations = [x.astype(jnp.bfloat16) for x in draw(case.activations)]
  parameters = draw(case.parameters, seed=1)
  value, gradients = value_and_gradients(form(FAST, case), [*activations, *parameters])
  exact = [x.astype(np.float32) for x in activations]
  expected, expected_gradients = value_and_gradients(form(PLAIN, case), [*exact, *parameters])
  assert value.dtype == (jnp.bfloat16 if activations else jnp.float32)
  assert_close(value, expected, relative=0.01)
  assert [g.dtype for g in gradients] == [x.dtype for x in (*activations, *parameters)]
  for i, (actual, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
    exact_sum = i >= len(activations)  # of a parameter: in float32
    assert_close(actual, wanted, relative=1e-5 if exact_sum else 0.02, name=f'gradient {i}')


@each(*CASES)
def test_fast_under_vmap(case, platform):
  """A batch of activations with parameters in common: a gradient for each example."""
  shared = bool(case.activations)
  activations = draw(case.activations, 4)
  parameters = draw(case.parameters, *() if shared else (4,), seed=1)
  axes = [0] * len(activations) + [None if shared else 0] * len(parameters)
  function = functools.partial(value_and_gradients, form(FAST, case))
  values, gradients = jax.vmap(lambda *arrays: function(arrays), axes)(*activations, *parameters)
  plain = form(PLAIN, case)
  for i in range(4):
    arrays = [
      x if axis is None else x[i] for x, axis in zip((*activations, *parameters), axes, strict=True)
    ]
    value, expected = value_and_gradients(plain, arrays)
    assert_close(values[i], value)
    for j, (actual, wanted) in enumerate(zip(gradients, expected, strict=True)):
      assert_close(actual[i], wanted, name=f'example {i}, gradient {j}')


# --- whole models

MODELS = {
  'mae_hivit_tiny': TINY_MAE | {'rpe': True, 'depths': (1, 1, 1), 'decoder_depth': 1},
  'mae_vit_base': TINY_VIT | {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2},
  'simmim_swin_tiny': TINY_SWIN,
}
HELP = {'custom_vjp_call', 'optimization_barrier', 'platform_index'}


def _loss(name: str, **options):
  """A model's loss, a function of its parameters, and these."""
  graphdef, params = random_model(name, **MODELS[name], **options)
  encoder = nnx.merge(graphdef, params)
  units = encoder.grid[0] * encoder.grid[1]
  images = random_images(2, *encoder.image_size, 3)
  noise = np.random.default_rng(0).random((2, units), np.float32)
  return lambda params: nnx.merge(graphdef, params)(images, noise=noise).loss, params


@pytest.mark.slow
def test_a_plain_model_has_the_loss_and_the_gradients_of_a_fast_one():
  (fast, params), (plain, _) = (_loss('mae_hivit_tiny', ops=ops) for ops in choice.FORMS)
  loss, gradients = jax.jit(jax.value_and_grad(fast))(params)
  expected, expected_gradients = jax.jit(jax.value_and_grad(plain))(params)
  assert_close(loss, expected)
  assert_trees_close(gradients, expected_gradients, relative=5e-5)


@pytest.mark.parametrize('name', MODELS)
def test_plain_models_are_made_of_definitions_only(name):
  def help_of(ops: str) -> set[str]:
    loss, params = _loss(name, ops=ops)
    programs = (equations(function, params) for function in (loss, jax.grad(loss)))
    return {e.primitive.name for program in programs for e in program} & HELP

  assert help_of('fast') == HELP
  assert help_of('plain') == set()


def test_of_cudnn_and_plain_only_one_is_possible():
  assert choice.choose('fast', 'cudnn').attend is not FAST.attend
  message = 'attention=cudnn is a fast form, which ops=plain excludes'
  with pytest.raises(choice.UserError, match=message):
    choice.choose('plain', 'cudnn')
