"""Initial values of parameters: constant, or drawn in pieces of one shape.

JAX compiles a program for every shape that it draws, which takes longer than the drawing: a model
has dozens of shapes, here all share one program.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import core

_PIECE = 1 << 16  # numbers


class _Keys:
  """The keys of `nnx.Rngs(seed).params`.

  Counted by Python: Flax asks its own counter, an array, for its sharding, and in a trace JAX
  answers by an error whose text it puts together from all that was traced before. That took 18 s
  for a model of 600 parameters.
  """

  def __init__(self, seed: int):
    self._key, self._count = jax.random.key(seed), 0

  def params(self) -> jax.Array:
    key = jax.random.fold_in(self._key, self._count)
    self._count += 1
    return key


def keys(seed: int) -> nnx.Rngs:
  """Returns the `rngs` of a model's constructor, with the numbers of `nnx.Rngs(seed)`."""
  return cast(nnx.Rngs, _Keys(seed))


def normal(std: float) -> Callable:
  """Normal of mean 0 and standard deviation `std`."""
  return functools.partial(_draw, _normal, std)


def uniform(bound: float) -> Callable:
  """Uniform in [-bound, bound)."""
  return functools.partial(_draw, _uniform, bound)


def constant(value: float) -> Callable:
  """All equal to `value`. NumPy fills them: JAX would compile a program for every shape."""
  return functools.partial(_filled, value)


def _filled(
  value: float,
  key: jax.Array,
  shape: tuple[int, ...],
  dtype: Any = jnp.float32,
  out_sharding: Any = None,
) -> jax.Array:
  del key, out_sharding
  return jnp.asarray(np.full(shape, value, dtype), dtype)  # without the dtype this compiles as well


@jax.jit
def _normal(key: jax.Array, piece: Any, std: Any) -> jax.Array:
  return std * jax.random.normal(jax.random.fold_in(key, piece), (_PIECE,))


@jax.jit
def _uniform(key: jax.Array, piece: Any, bound: Any) -> jax.Array:
  key = jax.random.fold_in(key, piece)
  return jax.random.uniform(key, (_PIECE,), minval=-bound, maxval=bound)


def _draw(
  piece: Callable,
  scale: float,
  key: jax.Array,
  shape: tuple[int, ...],
  dtype: Any = jnp.float32,
  out_sharding: Any = None,
) -> jax.Array:
  """An initialiser as Flax takes them; inside a trace it draws the same numbers."""
  del out_sharding
  width, numbers = np.float32(scale), _numbers(shape)
  first = piece(key, numbers[0], width)
  if isinstance(first, core.Tracer):
    return _traced(piece, key, width, tuple(shape), jnp.dtype(dtype))
  others = [piece(key, number, width) for number in numbers[1:]]
  return _shaped(np.stack(jax.device_get([first, *others])), shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))  # traced once for each shape
def _traced(
  piece: Callable, key: jax.Array, width: Any, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  pieces = jax.vmap(piece, in_axes=(None, 0, None))(key, _numbers(shape), width)
  return _shaped(pieces, shape, dtype)


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
  """Of the pieces that an array needs."""
  return np.arange(max(1, -(-math.prod(shape) // _PIECE)), dtype=np.uint32)


def _shaped(pieces: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  return jnp.asarray(pieces.reshape(-1)[: math.prod(shape)].reshape(shape), dtype)
