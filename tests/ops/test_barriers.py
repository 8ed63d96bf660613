"""What the order of computation on CPUs rests on: barriers that XLA keeps."""

import re

import jax
import jax.numpy as jnp

from hivit_jax.ops import norm
from hivit_jax.ops.barriers import cpu_barrier
from hivit_jax.ops.linear import affine
from hivit_jax.train import sharding


def compiled(function, *arrays):
  options = sharding.compiler_options(sharding.make_mesh())
  return jax.jit(function, compiler_options=options).lower(*arrays).compile().as_text()


def test_xla_keeps_barriers_of_training_steps():
  tree = {'a': jnp.ones(3), 'b': jnp.ones((4, 5))}
  text = compiled(lambda tree: jax.tree.map(jnp.square, cpu_barrier(tree)), tree)
  # Each leaf has its own: one for all would wait for the last of them.
  assert sorted(re.findall(r'= (f32\[[\d,]+\])\S* opt-barrier\(', text)) == ['f32[3]', 'f32[4,5]']


def test_the_gradient_of_a_weight_waits_for_that_of_the_input():
  def loss(x, kernel):
    return jnp.square(affine(x, kernel, None)).sum()

  text = compiled(jax.grad(loss, argnums=(0, 1)), jnp.ones((64, 32)), jnp.ones((32, 48)))
  # Its other operand comes out of a barrier together with the input's gradient.
  assert re.search(r'= \(f32\[64,48\]\S*, f32\[64,32\]\S*\) opt-barrier\(', text)


def test_the_sums_of_layer_norm_wait_on_gpus_only():
  def loss(x, scale, bias):
    return norm._normalise(x, scale, bias, 1e-6).sum()

  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(jnp.ones((4, 8)), *jnp.ones((2, 8)))
  for platform, barriers in (('cuda', 1), ('cpu', 0), ('tpu', 0)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('optimization_barrier') == barriers, platform
