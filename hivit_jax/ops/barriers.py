"""Order of computation where a compiler needs help."""

from typing import Any

import jax


def cpu_barrier(x: Any) -> Any:
  """`x`, computed before anything that reads it; for XLA's CPU backend only.

  Of a tree of arrays, each by itself. It takes effect where the program is compiled with
  `train.sharding.compiler_options`.
  """
  each = lambda x: jax.tree.map(jax.lax.optimization_barrier, x)  # noqa: E731
  return jax.lax.platform_dependent(x, cpu=each, default=lambda x: x)


def cpu_after(x: jax.Array, other: jax.Array) -> jax.Array:
  """`x` for what is to be computed after `other`; as `cpu_barrier`."""
  first = lambda x, other: jax.lax.optimization_barrier((x, other))[0]  # noqa: E731
  return jax.lax.platform_dependent(x, other, cpu=first, default=lambda x, other: x)


def cuda_barrier(*xs: jax.Array) -> tuple[jax.Array, ...]:
  """`xs`, not to be computed again by what reads them; for XLA's CUDA backend only."""
  return jax.lax.platform_dependent(
    *xs, cuda=lambda *xs: jax.lax.optimization_barrier(xs), default=lambda *xs: xs
  )
