"""Picking units, with gradients that are gathers too.

The derivative of a gather is a scatter-add. GPUs add in any order, so two runs differ in their last
bits. Where every unit is picked at most once, each place of the gradient has at most one source:
looking it up is a gather, the same on every run.

In all functions `ids` are integer positions; within an example no two are equal.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def units_plain(units: jax.Array, ids: jax.Array) -> jax.Array:
  """Picks units of each example: (B, N, ...) and (B, K) -> (B, K, ...)."""
  return jnp.asarray(units)[jnp.arange(ids.shape[0])[:, None], ids]


def shared_plain(values: jax.Array, ids: jax.Array) -> jax.Array:
  """Picks from what all examples share: (N, ...) and (B, K) -> (B, K, ...)."""
  return jnp.asarray(values)[ids]


def pairs_plain(values: jax.Array, ids: jax.Array) -> jax.Array:
  """Picks pairs of units: (heads, N, N) and (B, K) -> (B, heads, K, K)."""
  return jnp.asarray(values)[:, ids[:, :, None], ids[:, None, :]].swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(count: int, units: jax.Array, ids: jax.Array) -> jax.Array:
  """`units[ids]` of `count` units: (count, ...) and (K,) -> (K, ...)."""
  return jnp.take(units, ids, axis=0, mode='fill')  # a wrong id gives NaN


def _forward(count, units, ids):
  return _take(count, units, ids), ids


def _backward(count, ids, g):
  picked = ids == jnp.arange(count)[:, None]  # (count, K)
  found = picked.any(axis=1).reshape(-1, *(1,) * (g.ndim - 1))
  own = jnp.take(g, picked.argmax(axis=1), axis=0, mode='clip')
  return jnp.where(found, own, jnp.zeros_like(own)), None


_take.defvjp(_forward, _backward)


def units_fast(units: jax.Array, ids: jax.Array) -> jax.Array:
  """`units_plain`; a position that does not exist gives NaN."""
  return _each(functools.partial(_take, units.shape[1]), 0, units, ids)


def shared_fast(values: jax.Array, ids: jax.Array) -> jax.Array:
  """`shared_plain`, as `units_fast`."""
  return _each(functools.partial(_take, len(values)), None, values, ids)


def pairs_fast(values: jax.Array, ids: jax.Array) -> jax.Array:
  """`pairs_plain`, as `units_fast`."""
  take = functools.partial(_take, values.shape[1])

  def pick(values, ids):
    rows = take(values.swapaxes(0, 1), ids)  # (K, heads, N)
    return take(rows.transpose(2, 1, 0), ids).transpose(1, 2, 0)

  return _each(pick, None, values, ids)


def _each(pick: Callable, axis: int | None, values: jax.Array, ids: jax.Array) -> jax.Array:
  """`pick` for every example; the derivative of what examples share is summed over them."""
  return jax.vmap(pick, in_axes=(axis, 0))(jnp.asarray(values), jnp.asarray(ids))
