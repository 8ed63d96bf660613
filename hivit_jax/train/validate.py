"""Whether the values of a config make sense by themselves, said before anything is built.

What depends on the model, the devices or the data is checked where it is built.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import ml_collections

from hivit_jax.data import randaugment, transforms
from hivit_jax.errors import UserError, flag
from hivit_jax.settings import dotted, get
from hivit_jax.train import assemble, schedules

_Test = Callable[[Any], bool]

# What is to hold, how to test it, and for which settings; None stands for "not set" and is let be.
_RULES: tuple[tuple[str, _Test, str], ...] = (
  (
    'at least 1',
    lambda x: x >= 1,
    'max_steps batch_size accumulate_steps log_every_steps checkpoint.keep_last knn.k '
    'evaluation.batch_size pictures.count model.embed_dim model.depth model.window_size '
    'model.num_heads model.num_classes '
    'model.decoder_embed_dim model.decoder_depth model.decoder_num_heads',
  ),
  (
    '0 or more',
    lambda x: x >= 0,
    'data.num_threads data.num_workers optim.base_lr optim.lr optim.base_end_lr optim.end_lr '
    'optim.base_warmup_start_lr optim.warmup_start_lr optim.warmup_epochs optim.milestone_factor '
    'augment.mix_group optim.weight_decay checkpoint.every_epochs checkpoint.keep_every_epochs '
    'evaluation.every_epochs knn.every_epochs knn.bank_size pictures.every_epochs augment.mixup '
    'augment.cutmix augment.color_jitter model.head_std model.mlp_stages',
  ),
  ('more than 0', lambda x: x > 0, 'epochs optim.eps optim.clip_norm knn.temperature'),
  (
    '0 or more, and less than 1',
    lambda x: 0 <= x < 1,
    'optim.b1 optim.b2 optim.momentum ema_decay model.drop_path_rate augment.label_smoothing',
  ),
  ('more than 0 and less than 1', lambda x: 0 < x < 1, 'model.mask_ratio'),
  ('more than 0, at most 1', lambda x: 0 < x <= 1, 'optim.layer_decay data.eval_crop'),
  (
    'from 0 to 1',
    lambda x: 0 <= x <= 1,
    'data.max_broken_fraction augment.erase augment.switch_probability',
  ),
  ('0 or more, and less than 2**32', lambda x: 0 <= x < 2**32, 'seed'),
  ('3 (RGB) or 1 (greyscale)', lambda x: x in (1, 3), 'channels'),
  (
    'depths of the stages, such as (2, 2, 20): none negative, the last at least 1',
    lambda x: len(x) in (3, 4) and min(x) >= 0 < x[-1] and all(isinstance(d, int) for d in x),
    'model.depths',
  ),
  (
    'two shares of the area, 0 < smallest <= largest <= 1',
    lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
    'augment.crop_scale',
  ),
  *(
    (f'one of {", ".join(known)}', known.__contains__, key)
    for key, known in (
      ('optim.schedule', schedules.NAMES),
      ('optim.layer_decay_of', schedules.SCALED),
      ('augment.interpolation', tuple(transforms.INTERPOLATIONS)),
    )
  ),
  (
    'epochs in rising order, such as (700,)',
    lambda x: all(0 < a < b for a, b in itertools.pairwise((*x, math.inf))),
    'optim.milestones',
  ),
  (
    'two ratios, 0 < narrowest <= widest',
    lambda x: len(x) == 2 and 0 < x[0] <= x[1] < math.inf,
    'augment.crop_ratio',
  ),
  (
    'one number a channel, of pixels in [0, 1]',
    lambda x: len(x) in (1, 3) and all(0 <= v <= 1 for v in x),
    'data.mean',
  ),
  (
    'one number a channel, more than 0',
    lambda x: len(x) in (1, 3) and all(0 < v < math.inf for v in x),
    'data.std',
  ),
)

# What may be None; everything else always has a value.
_OPTIONAL = (
  'max_steps model.name model.embed_dim model.depth model.depths model.window_size '
  'model.mlp_stages model.num_heads model.stem_blocks model.rpe model.layer_scale '
  'model.fpn_dim model.fpn_depth '
  'model.num_classes model.head_std '
  'model.head_batch_norm model.decoder_embed_dim model.decoder_depth model.decoder_num_heads '
  'model.mask_ratio model.norm_pix_loss model.target model.hifeat model.scan '
  'init data.data_dir data.eval_crop augment.rand_augment augment.mix_group optim.lr optim.end_lr '
  'optim.warmup_start_lr optim.layer_decay optim.clip_norm ema_decay'
)
OPTIONAL = frozenset(_OPTIONAL.split())


def checked(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of a config that `check` accepts, with the image size as (height, width)."""
  check(config)
  config = config.copy_and_resolve_references()
  config.image_size = assemble.image_size(config)
  return config


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError, with the key, its value and what is possible, unless all values make sense.

  Args:
    config: see configs/base.py; it stays as it is.
  """
  for key, value in dotted(config).items():
    if value is None and key not in OPTIONAL:
      raise UserError(f'config.{key}=None: this setting always has a value')
  for expected, test, keys in _RULES:
    for key in keys.split():
      value = get(config, key)
      if value is not None and not _holds(test, value):
        raise UserError(f'config.{key}={value}: expected {expected}')
  assemble.image_size(config)
  if config.optim.warmup_epochs >= config.epochs:
    raise UserError(
      f'config.optim.warmup_epochs={config.optim.warmup_epochs} is not shorter than '
      f'config.epochs={config.epochs}: the learning rate would only rise; for a short run: '
      f'--config.optim.warmup_epochs={config.epochs / 20:g}'
    )
  o = config.optim
  if o.schedule == 'multistep' and not (o.milestones and o.milestones[-1] < config.epochs):
    raise UserError(
      f'config.optim.milestones={tuple(o.milestones)}: config.optim.schedule=multistep takes '
      f'epochs before the end, config.epochs={config.epochs}; for a short run: '
      f'--config.optim.milestones={config.epochs * 7 / 8:g}, or --config.optim.schedule=cosine'
    )
  if config.augment.rand_augment:
    randaugment.rand_augment(config.augment.rand_augment, tuple(config.data.mean))
  for key in ('data.mean', 'data.std'):
    count = len(get(config, key))
    if count != config.channels and config.channels != 1:  # one channel gets the average of three
      raise UserError(
        f'config.{key}: {count} numbers for config.channels={config.channels}; if it is the same '
        f'for all: {flag(key, get(config, key)[:1] * config.channels)}'
      )


def _holds(test: _Test, value: Any) -> bool:
  try:
    return test(value) and (not isinstance(value, float) or math.isfinite(value))
  except TypeError:  # text where numbers belong
    return False
