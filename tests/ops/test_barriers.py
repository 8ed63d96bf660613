"""Barriers: where they are, and that XLA keeps them."""

import re

import jax
import jax.numpy as jnp

from hivit_jax.ops import norm
from hivit_jax.ops.barriers import compiler_options


def test_xla_keeps_barriers_of_training_steps():
  def function(x):
    return jnp.square(jax.lax.optimization_barrier(x))

  jitted = jax.jit(function, compiler_options=compiler_options('cpu'))
  text = jitted.lower(jnp.ones((4, 5))).compile().as_text()
  assert re.findall(r'= (f32\[[\d,]+\])\S* opt-barrier\(', text) == ['f32[4,5]']


def test_the_sums_of_layer_norm_wait_on_gpus_only():
  def loss(x, scale, bias):
    return norm.fast(x, scale, bias, 1e-6).sum()

  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(jnp.ones((4, 8)), *jnp.ones((2, 8)))
  for platform, barriers in (('cuda', 1), ('cpu', 0), ('tpu', 0)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('optimization_barrier') == barriers, platform
