"""Order of computation where a compiler needs help."""

import jax


def between_blocks_plain(x: jax.Array) -> jax.Array:
  """What one block gives and the next one takes: nothing happens to it."""
  return x


def between_blocks_fast(x: jax.Array) -> jax.Array:
  """`x`, computed before anything that reads it; for XLA's CPU backend only.

  Without it the residual sums of the gradient are fused over all layers, and every layer computes
  those of the layers after it again.
  """
  return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def cuda_barrier(*xs: jax.Array) -> tuple[jax.Array, ...]:
  """`xs`, not to be computed again by what reads them; for XLA's CUDA backend only."""
  return jax.lax.platform_dependent(
    *xs, cuda=lambda *xs: jax.lax.optimization_barrier(xs), default=lambda *xs: xs
  )


def compiler_options(platform: str) -> dict[str, str]:
  """Options for the compilation of training steps.

  XLA's CPU backend drops optimization barriers before it fuses, which makes that between blocks
  useless and lets it undo `jax.checkpoint`; here it must keep them.
  """
  return {'xla_disable_hlo_passes': 'cse_barrier_expander'} if platform == 'cpu' else {}
