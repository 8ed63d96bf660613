"""Whether each value of a config makes sense, checked before anything is built.

What depends on the model, the devices or the data is checked where it is built.
"""

import itertools
import math
import re
from collections.abc import Callable, Collection
from typing import Any

import ml_collections

from hivit_jax.data import randaugment, transforms
from hivit_jax.errors import UserError, flag
from hivit_jax.interop import channels
from hivit_jax.reporting import trackers
from hivit_jax.settings import DTYPES, MAX_CHANNELS, dotted, get, is_imported, is_picture
from hivit_jax.train import assemble, best, schedules

_Test = Callable[[Any], bool]

# What is to hold, how to test it, and for which settings; None stands for "not set" and is let be.
_RULES: tuple[tuple[str, _Test, str], ...] = (
  (
    'at least 1',
    lambda x: x >= 1,
    'steps max_steps batch_size accumulate_steps log_every_steps checkpoint.keep_last knn.k '
    'evaluation.batch_size pictures.count model.embed_dim model.depth model.window_size '
    'model.num_heads model.num_classes model.neck_channels model.hidden model.proposals '
    'model.detections model.candidates detect.long_side detect.eval_short_side detect.objects '
    'model.decoder_embed_dim model.decoder_depth model.decoder_num_heads data.num_threads',
  ),
  (
    '0 or more',
    lambda x: x >= 0,
    'data.num_workers optim.base_lr optim.lr optim.base_end_lr optim.end_lr '
    'optim.base_warmup_start_lr optim.warmup_start_lr optim.warmup_epochs optim.warmup_steps '
    'optim.milestone_factor '
    'augment.mix_group optim.weight_decay checkpoint.every_epochs checkpoint.keep_every_epochs '
    'evaluation.every_epochs knn.every_epochs knn.bank_size rankme.every_epochs rankme.size '
    'pictures.every_epochs augment.mixup augment.cutmix augment.color_jitter '
    'model.head_std model.mlp_stages',
  ),
  (
    'more than 0',
    lambda x: x > 0,
    'epochs optim.eps optim.clip_norm optim.power knn.temperature model.anchor_scale',
  ),
  (
    '0 or more, and less than 1',
    lambda x: 0 <= x < 1,
    'model.score_threshold optim.b1 optim.b2 optim.momentum ema_decay model.drop_path_rate '
    'augment.label_smoothing',
  ),
  ('more than 0 and less than 1', lambda x: 0 < x < 1, 'model.mask_ratio'),
  ('more than 0, at most 1', lambda x: 0 < x <= 1, 'optim.layer_decay data.eval_crop'),
  (
    'from 0 to 1',
    lambda x: 0 <= x <= 1,
    'data.max_broken_fraction augment.erase augment.switch_probability',
  ),
  ('0 or more, and less than 2**32', lambda x: 0 <= x < 2**32, 'seed'),
  (
    f'a number from 1 to {MAX_CHANNELS}',
    lambda x: isinstance(x, int) and 1 <= x <= MAX_CHANNELS,
    'channels',
  ),
  (
    'one channel, or three, counted from 1, such as 3,2,1',
    lambda x: len(x) in (1, 3) and all(isinstance(c, int) and c >= 1 for c in x),
    'pictures.channels',
  ),
  (
    'depths of the stages, such as (2, 2, 20): none negative, the last at least 1',
    lambda x: len(x) in (3, 4) and min(x) >= 0 < x[-1] and all(isinstance(d, int) for d in x),
    'model.depths',
  ),
  (
    'at least 4',  # so that a quarter is one
    lambda x: x >= 4,
    'detect.anchors detect.rois',
  ),
  (
    'one number or more of pixels, at least 1',
    lambda x: len(x) >= 1 and all(isinstance(v, int) and v >= 1 for v in x),
    'detect.short_sides',
  ),
  (
    'canvases such as ((544,832),(832,544)), or none',
    lambda x: all(len(v) == 2 and all(isinstance(s, int) and s >= 1 for s in v) for v in x),
    'detect.buckets detect.eval_buckets',
  ),
  (
    'numbers of pixels, at least 1, or none',
    lambda x: all(isinstance(v, int) and v >= 1 for v in x),
    'detect.crop_first',
  ),
  (
    'two numbers above 0, the smaller one first, or none',
    lambda x: not len(x) or (len(x) == 2 and 0 < x[0] <= x[1]),
    'detect.scale_jitter',
  ),
  (
    'two numbers, 1 <= smallest <= largest',
    lambda x: len(x) == 2 and 1 <= x[0] <= x[1],
    'detect.crop_sides',
  ),
  (
    'two numbers, at least 1: of training, of evaluation',
    lambda x: len(x) == 2 and min(x) >= 1,
    'model.nms_pre',
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
      ('data.dtype', DTYPES),
      ('init_channels', channels.WAYS),
    )
  ),
  (
    'epochs in rising order, such as (700,), or steps with config.steps',
    lambda x: all(0 < a < b for a, b in itertools.pairwise((*x, math.inf))),
    'optim.milestones',
  ),
  (
    'METRIC:max or METRIC:min, such as eval/top1:max',
    lambda x: bool(best.parse(x)),
    'checkpoint.keep_best',
  ),
  (
    'two ratios, 0 < narrowest <= widest',
    lambda x: len(x) == 2 and 0 < x[0] <= x[1] < math.inf,
    'augment.crop_ratio',
  ),
  (
    'one number per channel',
    lambda x: len(x) >= 1 and all(map(math.isfinite, x)),
    'data.mean',
  ),
  (
    'one number per channel, more than 0',
    lambda x: len(x) >= 1 and all(0 < v < math.inf for v in x),
    'data.std',
  ),
  (
    'names such as package.module:Name, separated by commas',
    lambda x: all(map(is_imported, listed(x))),
    'evaluators',
  ),
  (
    f'names of trackers: {", ".join(trackers.TRACKERS)} or package.module:Name',
    trackers.known,
    'trackers',
  ),
)

# What may be None; everything else always has a value.
_OPTIONAL = (
  'steps max_steps model.name model.embed_dim model.depth model.depths model.window_size '
  'model.mlp_stages model.num_heads model.stem_blocks model.rpe model.layer_scale model.fpn_dim '
  'model.fpn_depth model.num_classes model.head_std '
  'model.head_batch_norm model.decoder_embed_dim model.decoder_depth model.decoder_num_heads '
  'model.mask_ratio model.norm_pix_loss model.target model.hifeat model.scan '
  'model.position_image_size model.head_channels model.auxiliary_channels model.linear_levels '
  'model.dropout_rate '
  'model.global_blocks model.neck_channels model.hidden model.cascade model.anchor_scale '
  'model.nms_pre model.proposals model.detections model.candidates model.score_threshold '
  'init data.data_dir data.eval_crop data.num_threads data.num_workers augment.rand_augment '
  'augment.mix_group optim.lr optim.end_lr optim.warmup_start_lr optim.warmup_steps '
  'optim.layer_decay optim.clip_norm ema_decay checkpoint.keep_best pictures.channels'
)
OPTIONAL = frozenset(_OPTIONAL.split())


def checked(
  config: ml_collections.ConfigDict, given: Collection[str] = ()
) -> ml_collections.ConfigDict:
  """A copy of a config that `check` accepts, with the image size as (height, width)."""
  check(config, given)
  config = config.copy_and_resolve_references()
  config.image_size = assemble.image_size(config)
  return config


def check(config: ml_collections.ConfigDict, given: Collection[str] = ()) -> None:
  """Raises UserError, with the key, its value and what is possible, unless all values make sense.

  Args:
    config: see configs/base.py; it stays as it is.
    given: dotted settings on the command line.
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
  for epochs, steps in (('epochs', 'steps'), ('optim.warmup_epochs', 'optim.warmup_steps')):
    if epochs in given and get(config, steps) is not None:
      raise UserError(
        f'{flag(epochs, get(config, epochs))} and config.{steps}={get(config, steps)}: one of them '
        f'must go; to count in epochs: {flag(steps, None)}'
      )
  if not assemble.mixes_units(config):
    check_lengths(config)
  further_sets(config)
  for key, example in assemble.task_class(config).required.items():
    if not get(config, key):
      raise UserError(f'config.task={config.task} needs config.{key}, such as {example}')
  if config.augment.rand_augment:
    randaugment.rand_augment(config.augment.rand_augment, tuple(config.data.mean))
  _check_pixels(config)


def _check_pixels(config: ml_collections.ConfigDict) -> None:
  """UserError unless what is about pixels goes together: their statistics, changes, pictures."""
  count, dtype = config.channels, config.data.dtype
  for key in ('data.mean', 'data.std'):
    value = get(config, key)
    if len(value) != count and (count, len(value)) != (1, 3):  # one channel gets their average
      way = (
        f'if all channels have the same: {flag(key, value[:1] * count)}'
        if is_picture(count, dtype)
        else 'python -m hivit_jax.tools.statistics DATA measures them'
      )
      raise UserError(f'config.{key}: {len(value)} numbers for config.channels={count}; {way}')
    if key == 'data.mean' and dtype != 'float32' and not all(0 <= v <= 1 for v in value):
      raise UserError(
        f'config.{key}={tuple(value)}: {dtype} is scaled to [0, 1], and so are its statistics'
      )
  shown = config.pictures.channels
  if shown is not None and max(shown) > count:
    raise UserError(
      f'config.pictures.channels={tuple(shown)}: there are config.channels={count}, counted from 1'
    )
  if is_picture(count, dtype):
    return
  such = f'config.channels={count} and config.data.dtype={dtype}'
  for key, off in (('rand_augment', None), ('color_jitter', 0)):
    if config.augment[key]:
      raise UserError(
        f'config.augment.{key}={config.augment[key]} changes colours, of bytes of 1 or 3 channels; '
        f'with {such}: {flag(f"augment.{key}", off)}'
      )
  if not assemble.task_class(config).any_images:
    raise UserError(
      f'config.task={config.task} takes bytes of 3 channels or 1, not {such}; the others take any'
    )


def listed(text: str) -> list[str]:
  """What is separated by commas in a setting."""
  return [part.strip() for part in text.split(',') if part.strip()]


def further_sets(config: ml_collections.ConfigDict) -> dict[str, tuple[str, str]]:
  """The sets of `config.evaluation.more`: name -> (data set, split).

  Raises:
    UserError: an entry is not NAME=SPLIT@DATA or NAME=SPLIT, or a name comes twice.
  """
  found = {}
  for text in listed(config.evaluation.more):
    match = re.fullmatch(r'(\w+)=([^@]+)(?:@(.+))?', text)
    if match is None or match[1] in found:
      reason = 'expected NAME=SPLIT or NAME=SPLIT@DATA' if match is None else 'a name comes twice'
      raise UserError(
        f'config.evaluation.more={config.evaluation.more}: {reason} at "{text}"; a list such as '
        'v2=test@imagenet_v2,old=validation'
      )
    found[match[1]] = (match[3] or config.data.name, match[2])
  return found


def check_lengths(config: ml_collections.ConfigDict, epochs_per_step: float = 1.0) -> None:
  """Raises UserError unless warmup and milestones are over before the run is.

  Args:
    config: see configs/base.py.
    epochs_per_step: see `assemble.schedule`.
  """
  o, made = config.optim, assemble.schedule(config, epochs_per_step)
  key = 'epochs' if config.steps is None else 'steps'
  end = f'config.{key}={config[key]}'
  if made.warmup >= made.length:
    warmup = 'optim.warmup_epochs' if o.warmup_steps is None else 'optim.warmup_steps'
    short = made.length / 20
    short = f'{short * epochs_per_step:g}' if o.warmup_steps is None else int(short)
    raise UserError(
      f'config.{warmup}={get(config, warmup)} is not shorter than {end}: the learning rate would '
      f'only rise; for a short run: {flag(warmup, short)}'
    )
  if o.schedule == 'step' and not (o.milestones and made.milestones[-1] < made.length):
    raise UserError(
      f'config.optim.milestones={tuple(o.milestones)}: config.optim.schedule=step takes {key} '
      f'before the end, {end}; for a short run: '
      f'{flag("optim.milestones", f"{config[key] * 7 / 8:g}")}, or --config.optim.schedule=cosine'
    )


def _holds(test: _Test, value: Any) -> bool:
  try:
    return test(value) and (not isinstance(value, float) or math.isfinite(value))
  except (TypeError, ValueError):  # text where numbers belong, or not of this form
    return False
