"""What stands around a run."""

import re

import jax
import jax.numpy as jnp
import pytest

from configs import demo
from hivit_jax.errors import UserError
from hivit_jax.train import run


def test_full_memory_is_told_with_the_ways_out():
  message = 'a device ran out of memory: .*allocating 40+ bytes.*what helps: (.*); '
  with (
    pytest.raises(UserError, match=message) as error,
    run._told_of_full_memory(demo.get_config()),
  ):
    jnp.zeros(10**15).block_until_ready()
  assert re.search(message, str(error.value))[1] == (
    '--config.accumulate_steps=2, --config.model.remat=True, --config.batch_size=16, '
    '--config.evaluation.batch_size=128, more devices'
  )


def test_other_errors_of_jax_are_left_as_they_are():
  with pytest.raises(jax.errors.JaxRuntimeError), run._told_of_full_memory(None):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')
