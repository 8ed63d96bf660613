"""The type of numbers that must not be rounded: statistics, softmax, loss, gradients."""

from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
  """float32, or float64 for models that compute in float64."""
  return jnp.promote_types(dtype, jnp.float32)


def widen(x: jax.Array) -> jax.Array:
  """`x` in at least float32."""
  return x.astype(at_least_float32(x.dtype))
