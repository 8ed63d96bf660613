"""Order of computation where a compiler needs help."""

import jax


def cpu_barrier(x: jax.Array) -> jax.Array:
  """`x`, computed before anything that reads it; for XLA's CPU backend only.

  It takes effect where the program is compiled with `train.sharding.compiler_options`.
  """
  return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
