"""What tests of gradients that are written by hand share."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(function, *args):
  out = jax.eval_shape(function, *args)
  weights = draw(9, *out.shape)
  return jax.grad(lambda *a: (function(*a) * weights).sum(), range(len(args)))(*args)


def assert_rounded(function):
  """Gradients in bfloat16 are those of float32, rounded.

  Args:
    function: for each of the two types, of arrays (..., 24).
  """
  x = 3 * draw(0, 4, 24).astype(jnp.bfloat16)
  weights = draw(1, 4, 24).astype(jnp.bfloat16)
  ours, exact = (
    jax.grad(lambda x, d=d: (function[d](x) * weights.astype(d)).astype(jnp.float32).sum())(
      x.astype(d)
    )
    for d in (jnp.bfloat16, jnp.float32)
  )
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-6, atol=2**-7)
