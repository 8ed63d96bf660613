"""Counting operations from a program as traced."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hivit_jax.ops import conv, triton_attention
from hivit_jax.ops.attention import plain as attend
from hivit_jax.planning.flops import matmul_bytes, matmul_flops
from tests.helpers import abstract_model

A = jax.ShapeDtypeStruct((3, 5), jnp.float32)
B = jax.ShapeDtypeStruct((5, 7), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
ONCE = 2 * 4**3


def _loop(body, length):
  return lambda x: jax.lax.scan(lambda x, _: (body(x), None), x, None, length=length)[0]


def test_products():
  assert matmul_flops(jnp.matmul, A, B) == 2 * 3 * 5 * 7
  batched = jax.ShapeDtypeStruct((6, 3, 5), jnp.float32)
  assert matmul_flops(jnp.matmul, batched, B) == 6 * 2 * 3 * 5 * 7
  other = jax.ShapeDtypeStruct((6, 3, 2), jnp.float32)
  product = functools.partial(jnp.einsum, 'bij,bik->bjk')
  assert matmul_flops(product, batched, other) == 6 * 2 * 5 * 3 * 2
  two = jax.ShapeDtypeStruct((3, 5, 7), jnp.float32)
  assert matmul_flops(functools.partial(jnp.einsum, 'ijk,ijk->i'), two, two) == 2 * 3 * 5 * 7


def test_bytes_of_products():
  assert matmul_bytes(jnp.matmul, A, B) == 4 * (3 * 5 + 5 * 7 + 3 * 7)
  half = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
  three = lambda x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ x), x)  # noqa: E731
  assert matmul_bytes(three, half) == 3 * 2 * (3 * 4 * 4)


def test_only_products_count():
  assert matmul_flops(lambda x: jnp.exp(x).sum() * x.max(), A) == 0
  assert matmul_flops(lambda x: jnp.sort(x @ x), SQUARE) == ONCE


def test_gradients():
  def loss(a, b):
    return (a @ b).sum()

  # The value and each of the two derivatives are a product.
  both = jax.value_and_grad(loss, argnums=(0, 1))
  assert matmul_flops(both, A, B) == 3 * 2 * 3 * 5 * 7


def test_calls_and_loops():
  square = lambda x: x @ x  # noqa: E731
  assert matmul_flops(jax.jit(square), SQUARE) == ONCE
  assert matmul_flops(lambda x: jax.jit(jax.jit(square))(x) @ x, SQUARE) == 2 * ONCE
  options = {'xla_backend_optimization_level': 0}
  assert matmul_flops(jax.jit(square, compiler_options=options), SQUARE) == ONCE
  gradient = jax.value_and_grad(jax.jit(lambda x: square(x).sum()))
  assert matmul_flops(jax.jit(gradient, compiler_options=options), SQUARE) == 3 * ONCE
  assert matmul_flops(_loop(square, 5), SQUARE) == 5 * ONCE
  assert matmul_flops(_loop(_loop(square, 3), 5), SQUARE) == 15 * ONCE
  assert matmul_flops(lambda x: jax.lax.fori_loop(0, 6, lambda _, x: square(x), x), SQUARE) == (
    6 * ONCE
  )
  assert matmul_flops(jax.vmap(square), jax.ShapeDtypeStruct((9, 4, 4), jnp.float32)) == 9 * ONCE


def test_recomputation_counts():
  def block(x):
    return jnp.sin(jnp.sin(x @ x) @ x)

  def loss(x):
    return block(x).sum()

  def recomputed(x):
    return jax.checkpoint(block)(x).sum()

  plain, again = (matmul_flops(jax.grad(f), SQUARE) for f in (loss, recomputed))
  assert plain == 6 * ONCE
  assert again == plain + 2 * ONCE


def test_the_dearest_branch_counts():
  def function(x):
    return jax.lax.switch(1, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

  def traced(i, x):
    return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

  assert matmul_flops(traced, jax.ShapeDtypeStruct((), jnp.int32), SQUARE) == 2 * ONCE
  assert matmul_flops(function, SQUARE) == 2 * ONCE


def test_loops_of_unknown_length():
  def until_large(x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

  with pytest.raises(ValueError, match='while loop of unknown length'):
    matmul_flops(until_large, SQUARE)
  harmless = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x)  # noqa: E731
  assert matmul_flops(harmless, SQUARE) == 0


def test_convolutions_count_as_products_at_every_place():
  image = jax.ShapeDtypeStruct((2, 8, 6, 4), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 4, 5), jnp.float32)
  forward = 2 * (2 * 8 * 6 * 5) * (3 * 3 * 4)
  assert matmul_flops(conv.plain, image, kernel) == forward
  gradients = jax.grad(lambda x, k: jnp.square(conv.fast(x, k)).sum(), (0, 1))
  assert matmul_flops(gradients, image, kernel) == 3 * forward


def test_attention_and_its_gradient():
  q = jax.ShapeDtypeStruct((2, 3, 8, 4), jnp.float32)
  product = 2 * 2 * 3 * 8 * 8 * 4
  assert matmul_flops(attend, q, q, q) == 2 * product
  gradient = jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2))
  assert matmul_flops(gradient, q, q, q) == 6 * product  # two, and two for each of them


@pytest.mark.parametrize(('size', 'gmacs'), [('tiny', 4.60), ('small', 9.07), ('base', 15.85)])
def test_forward_operations_are_the_published_ones(size, gmacs):
  graphdef, params = abstract_model(f'hivit_{size}')
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  flops = matmul_flops(lambda params, x: nnx.merge(graphdef, params)(x), params, images)
  assert flops / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_kernels_of_our_own_count_for_every_block():
  b, n, heads, d = 3, 32, 2, 16  # all rows of a block are tokens
  qkv = jax.ShapeDtypeStruct((b, n, 3 * heads * d), jnp.bfloat16)
  kernels = functools.partial(triton_attention.attend, heads=heads, interpret=True)

  def value_and_gradient(qkv):
    value, pullback = jax.vjp(kernels, qkv)
    return pullback(value)

  # Two products forward; backward the logits again and four more.
  assert matmul_flops(value_and_gradient, qkv) == 7 * 2 * b * heads * n * n * d
