"""What stands around a run."""

import jax
import jax.numpy as jnp
import pytest

from hivit_jax.errors import UserError
from hivit_jax.train import experiment


def test_full_memory_is_told_with_the_ways_out():
  message = 'a device has not enough memory: .*allocating 4000000000000000 bytes.*accumulate_steps'
  with pytest.raises(UserError, match=message), experiment.told_of_full_memory():
    jnp.zeros(10**15).block_until_ready()


def test_other_errors_of_jax_are_left_as_they_are():
  with pytest.raises(jax.errors.JaxRuntimeError), experiment.told_of_full_memory():
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')
