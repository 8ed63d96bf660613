"""The learning rate of a config, before there is a run."""

from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from flax import nnx

from hivit_jax.train import assemble, validate


def learning_rates(
  config: ml_collections.ConfigDict, epochs: Sequence[float] | np.ndarray
) -> dict[str, np.ndarray]:
  """The learning rate at some epochs, in double precision.

  Args:
    config: see configs/base.py; of the model only shapes are made, nothing is loaded.
    epochs: from 0 on, fractions as they are.

  Returns:
    `learning_rate`, of the head, and with layer decay `first_layer`, of what decays most; an array
    with a rate for each epoch.

  Raises:
    UserError: a setting that makes no sense.
  """
  validate.check(config)
  schedule, at = assemble.schedule(config), np.asarray(epochs, np.float64)
  rates = {'learning_rate': schedule(at)}
  if config.optim.layer_decay is not None:
    rates['first_layer'] = schedule(at, _lowest_scale(config))
  return rates


def grid(config: ml_collections.ConfigDict, points: int = 1001) -> np.ndarray:
  """Epochs to draw the curve by, with both sides of each place where it may jump."""
  validate.check(config)
  jumps = np.array([config.optim.warmup_epochs, *config.optim.milestones])
  jumps = jumps[jumps < config.epochs]  # a cosine ignores milestones, wherever they are
  even = np.linspace(0, config.epochs, points)
  return np.unique(np.concatenate([even, jumps, np.nextafter(jumps, 0)]))


def _lowest_scale(config: ml_collections.ConfigDict) -> float:
  assemble.check_model(config)  # says what is wrong with the model's name
  params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(assemble.model_creator(config))))
  return min(jax.tree.leaves(assemble.optimizer(config)(params).scales))
