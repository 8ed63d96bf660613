"""Order of computation where a compiler needs help."""

import jax


def cuda_barrier(*xs: jax.Array) -> tuple[jax.Array, ...]:
  """`xs`, not to be computed again by what reads them; for XLA's CUDA backend only."""
  return jax.lax.platform_dependent(
    *xs, cuda=lambda *xs: jax.lax.optimization_barrier(xs), default=lambda *xs: xs
  )


def compiler_options(platform: str) -> dict[str, str]:
  """Options for the compilation of training steps.

  XLA's CPU backend drops optimization barriers before it fuses, which undoes `jax.checkpoint`; here
  it must keep them.
  """
  return {'xla_disable_hlo_passes': 'cse_barrier_expander'} if platform == 'cpu' else {}
