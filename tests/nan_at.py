"""main.py with a fault: python -m tests.nan_at STEP FLAGS... finds NaN parameters at that step."""

import sys

import jax
import jax.numpy as jnp

import main
from hivit_jax import cli
from hivit_jax.train import step


def inject(at: int) -> None:
  make = step.make_train_step

  def make_faulty(*args, **kwargs):
    sound = make(*args, **kwargs)

    def faulty(state, batch):
      if state['step'] == at - 1:
        state = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, state)
      return sound(state, batch)

    return faulty

  step.make_train_step = make_faulty


if __name__ == '__main__':
  inject(int(sys.argv.pop(1)))
  cli.run(main.main)
