"""The learning rate of a config, before there is a run."""

from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from flax import nnx

from hivit_jax.train import assemble, inputs, validate
from hivit_jax.train.steps import Steps


def unit(config: ml_collections.ConfigDict) -> str:
  """What the length of a config's schedule is in: 'epoch' or 'step'."""
  return 'epoch' if config.steps is None else 'step'


def learning_rates(
  config: ml_collections.ConfigDict, times: Sequence[float] | np.ndarray, *, per: str = ''
) -> dict[str, np.ndarray]:
  """The learning rate at some times, in double precision.

  Args:
    config: see configs/base.py; of the model only shapes are made, nothing is loaded. Where steps
      and epochs must be compared, the training examples are counted.
    times: from 0 on, fractions as they are.
    per: what they count, 'epoch' or 'step'; '': see `unit`.

  Returns:
    `learning_rate`, of the head, and with layer decay `first_layer`, of what decays most; an array
    with a rate for each time.

  Raises:
    UserError: a setting that makes no sense, or the examples to be counted are not there.
  """
  validate.check(config)
  per = per or unit(config)
  compared = assemble.mixes_units(config) or per != unit(config)
  epochs_per_step = _epochs_per_step(config) if compared else 1.0
  validate.check_lengths(config, epochs_per_step)
  schedule = assemble.schedule(config, epochs_per_step)
  steps = np.asarray(times, np.float64) / (epochs_per_step if per == 'epoch' else 1)
  rates = {'learning_rate': schedule(steps)}
  if config.optim.layer_decay is not None:
    rates['first_layer'] = schedule(steps, _lowest_scale(config))
  return rates


def grid(config: ml_collections.ConfigDict, points: int = 1001) -> np.ndarray:
  """Times to draw the curve by, see `unit`, with both sides of each place where it may jump."""
  validate.check(config)
  epochs_per_step = _epochs_per_step(config) if assemble.mixes_units(config) else 1.0
  schedule = assemble.schedule(config, epochs_per_step)
  jumps = np.array([schedule.warmup, *schedule.milestones])
  jumps = jumps[jumps < schedule.length]  # a cosine ignores milestones, wherever they are
  even = np.linspace(0, schedule.length, points)
  steps = np.unique(np.concatenate([even, jumps, np.nextafter(jumps, 0)]))
  return steps if config.steps else steps * epochs_per_step


def _epochs_per_step(config: ml_collections.ConfigDict) -> float:
  examples = len(inputs.open_source(config, config.data.train_split, 'data.train_split'))
  return Steps(examples, config.batch_size).epochs_per_step


def _lowest_scale(config: ml_collections.ConfigDict) -> float:
  assemble.check_model(config)  # says what is wrong with the model's name
  params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(assemble.model_creator(config))))
  return min(jax.tree.leaves(assemble.optimizer(config)(params).scales))
