"""Softmax attention, its precision, and what cuDNN is asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.ops import attention
from hivit_jax.ops.attention import cudnn, plain
from tests.helpers import assert_close

SMALL = (5, 2, 6, 4)  # batch, heads, N, D


def _inputs(shape: tuple[int, ...], bias_rank: int | None) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  inputs = [rng.standard_normal(shape, np.float32) for _ in range(3)]
  if bias_rank:
    bias_shape = (*shape[:3], shape[2])[4 - bias_rank :]
    inputs.append(2 * rng.standard_normal(bias_shape, np.float32))
  return inputs


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(function, inputs, weights):
  value, pullback = jax.vjp(function, *inputs)
  return value, pullback(weights)


@pytest.mark.parametrize('bias_rank', [None, 3, 4])
def test_equals_softmax_attention(bias_rank):
  inputs = [x.astype(np.float64) for x in _inputs(SMALL, bias_rank)]
  q, k, v, *bias = inputs
  weights = np.exp(q @ k.swapaxes(-1, -2) + (bias[0] if bias else 0))
  expected = weights / weights.sum(axis=-1, keepdims=True) @ v
  assert_close(plain(*(x.astype(np.float32) for x in inputs)), expected)


def test_large_logits_do_not_overflow():
  q = np.full((1, 1, 3, 1), 100.0, np.float32)
  k = np.array([[[[100.0], [-100.0], [99.9]]]], np.float32)
  v = np.array([[[[1.0], [2.0], [3.0]]]], np.float32)
  weights = np.exp([0.0, -20000.0, -10.0])
  expected = weights @ [1.0, 2.0, 3.0] / weights.sum()
  np.testing.assert_allclose(plain(q, k, v)[0, 0, :, 0], expected, rtol=1e-4)


def test_softmax_is_float32_for_bfloat16_inputs():
  """Logits near 200, where bfloat16 has steps of 1: their differences of 0.25 must count."""
  q = jnp.array([[[[16.0, 1.0]]]], jnp.bfloat16).repeat(4, axis=2)
  k = jnp.array([[[[12.5, 0.0], [12.5, 0.25], [12.5, 0.5], [12.5, 0.75]]]], jnp.bfloat16)
  v = jnp.eye(4, dtype=jnp.bfloat16)[None, None]
  weights = np.exp([0.0, 0.25, 0.5, 0.75])
  out = plain(q, k, v)[0, 0, 0].astype(np.float32)
  np.testing.assert_allclose(out, weights / weights.sum(), rtol=0.01)


# --- cuDNN, which has no CPU version: JAX's own computation of the same call stands in


@pytest.fixture
def kernel_calls(monkeypatch) -> list:
  """Shape of q and lengths of the examples in the calls of cuDNN."""
  calls = []
  original = jax.nn.dot_product_attention

  def replaced(q, k, v, *, implementation, **options):
    assert implementation == 'cudnn'
    lengths = options['key_value_seq_lengths']
    calls.append((q.shape, None if lengths is None else lengths.tolist()))
    return original(q, k, v, implementation='xla', **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', replaced)
  return calls


@pytest.mark.parametrize(
  ('shape', 'biased', 'called'),
  [
    ((5, 2, 6, 8), False, ((5, 6, 2, 8), None)),
    ((5, 2, 6, 8), True, ((5, 6, 2, 8), None)),
    ((5, 2, 7, 8), False, ((5, 8, 2, 8), [7] * 5)),
    ((3, 4, 2, 6, 8), True, ((12, 6, 2, 8), None)),  # windows
    ((3, 4, 2, 7, 8), False, ((12, 8, 2, 8), [7] * 12)),
  ],
)
def test_what_cudnn_is_asked_for(kernel_calls, shape, biased, called):
  rng = np.random.default_rng(0)
  *inputs, weights = (rng.standard_normal(shape, np.float32) for _ in range(4))
  inputs.append(rng.standard_normal((2, *shape[-2:-1] * 2), np.float32) if biased else None)
  value, pullback = jax.vjp(attention._attend_by_cudnn, *inputs)
  gradients = pullback(weights)
  expected, expected_gradients = _value_and_gradients(plain, inputs, weights)
  assert_close(value, expected)
  for name, actual, wanted in zip(
    'qkvb'[: 3 + biased], gradients, expected_gradients, strict=False
  ):
    assert_close(actual, wanted, name=name)
  assert kernel_calls == [called]


@pytest.mark.parametrize(
  ('shape', 'dtype', 'bias', 'used'),
  [
    ((5, 2, 7, 8), jnp.bfloat16, None, True),
    ((5, 2, 6, 8), jnp.bfloat16, (2, 6, 6), True),
    ((5, 2, 7, 8), jnp.bfloat16, (2, 7, 7), False),
    ((5, 2, 6, 8), jnp.bfloat16, (5, 2, 6, 6), False),
    ((5, 2, 6, 8), jnp.float32, None, False),
    ((5, 2, 6, 12), jnp.bfloat16, None, False),
    ((1, 2, 6, 136), jnp.bfloat16, None, False),
  ],
)
def test_cudnn_is_used_where_it_fits(kernel_calls, shape, dtype, bias, used):
  x = jnp.ones(shape, dtype)
  bias = bias and jnp.ones(bias)
  out = cudnn(x, x, x, bias)
  assert (out.shape, out.dtype, len(kernel_calls)) == (shape, dtype, used)
  plain(x, x, x, bias)
  assert len(kernel_calls) == used


@pytest.mark.parametrize(('n', 'used'), [(127, False), (128, True), (129, False)])
def test_auto_takes_cudnn_for_many_tokens(kernel_calls, n, used):
  q, k, v = (jnp.ones((1, 1, n, 8), jnp.bfloat16) for _ in range(3))
  attention.auto(q, k, v)
  assert bool(kernel_calls) == used


@pytest.mark.parametrize('bias', [False, True])
def test_attention_of_a_projection(bias):
  rng = np.random.default_rng(0)
  qkv = rng.standard_normal((2, 5, 3, 2, 4), np.float32)  # heads of 4 channels
  added = rng.standard_normal((2, 5, 5), np.float32) if bias else None
  q, k, v = np.moveaxis(qkv, (2, 3), (0, 2))
  out = attention.of_projection(plain, qkv.reshape(2, 5, 24), 2, added)
  expected = np.moveaxis(plain(q / 2, k, v, added), 1, 2).reshape(2, 5, 8)
  assert_close(out, expected)
