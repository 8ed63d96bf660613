"""The Triton kernels for attention over few tokens, run by JAX's own operations."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.ops import attention, triton_attention
from tests.runs import on_devices

PLAIN = attention.projected
pytestmark = pytest.mark.slow


def draw(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.bfloat16)


def error(actual: jax.Array, exact: jax.Array) -> float:
  actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
  return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
  ('shape', 'heads', 'd'),
  [((2, 49), 2, 64), ((3, 16), 3, 16), ((2, 2, 7), 2, 32), ((1, 64), 1, 128)],
)
def test_errors_are_those_of_bfloat16(shape, heads, d):
  qkv, g = draw(*shape, 3 * heads * d), draw(*shape, heads * d)
  exact, exact_pullback = jax.vjp(lambda x: PLAIN(x, heads), qkv.astype(jnp.float32))
  (exact_gradient,) = exact_pullback(g.astype(jnp.float32))
  errors = {}
  for name, attend in (
    ('kernel', functools.partial(triton_attention.attend, interpret=True)),
    ('plain', PLAIN),
  ):
    value, pullback = jax.vjp(lambda x, attend=attend: attend(x, heads), qkv)
    (gradient,) = pullback(g)
    assert (value.dtype, gradient.dtype) == (jnp.bfloat16, jnp.bfloat16)
    errors[name] = error(value, exact), error(gradient, exact_gradient)
  assert errors['kernel'][0] < 1.2 * errors['plain'][0] < 5e-3
  assert errors['kernel'][1] < 1.2 * errors['plain'][1] < 5e-3


def test_under_vmap():
  qkv = draw(3, 2, 9, 96)

  def gradient(x):
    return jax.grad(lambda x: triton_attention.attend(x, 2, interpret=True)[..., 0].sum())(x)

  each = jax.vmap(gradient)(qkv)
  np.testing.assert_array_equal(each, jnp.stack([gradient(x) for x in qkv]))


@pytest.mark.parametrize(
  ('tokens', 'heads', 'dtype', 'biased'),
  [(65, 2, 'bfloat16', False), (5, 4, 'bfloat16', False), (5, 2, 'float32', False),
   (5, 2, 'bfloat16', True)],
)  # fmt: skip
def test_what_does_not_fit_is_computed_otherwise(tokens, heads, dtype, biased):
  qkv = draw(2, tokens, 96).astype(dtype)
  bias = draw(heads, tokens, tokens).astype('float32') if biased else None
  out = triton_attention.attend(qkv, heads, bias)  # a kernel would find no GPU
  np.testing.assert_array_equal(out, PLAIN(qkv, heads, bias))


def test_each_device_computes_its_own_examples():
  """In a process of its own: the number of devices is settled when JAX starts."""
  script = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from hivit_jax.ops import triton_attention

    def value_and_gradient(x):
      value, pullback = jax.vjp(lambda x: triton_attention.attend(x, 2, interpret=True), x)
      return value, pullback(value)[0]

    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 9, 96)), jnp.bfloat16)
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ('data', 'fsdp'))
    parted = jax.device_put(x, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
    compiled = jax.jit(value_and_gradient).lower(parted).compile()
    assert 'all-gather' not in compiled.as_text() and 'all-reduce' not in compiled.as_text()
    for ours, whole in zip(compiled(parted), value_and_gradient(x)):
      assert len({shard.index[0].start for shard in ours.addressable_shards}) == 4
      np.testing.assert_array_equal(ours, whole)
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script)],
    env=os.environ | on_devices(4),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
