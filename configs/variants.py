"""What `:variant` after a config's file means to most of them: a length, or `:debug`."""

import ml_collections

from hivit_jax.errors import UserError


def with_variant(
  config: ml_collections.ConfigDict, variant: str | None, *lengths: str
) -> ml_collections.ConfigDict:
  """A config as its variant says: `:debug`, or one of the lengths.

  Args:
    config: changed in place.
    variant: what follows the colon of `--config=file.py:variant`; None or '': none.
    *lengths: in epochs, the default first; none: the config keeps its own.

  Raises:
    UserError: the file has no such variant.
  """
  if variant == 'debug':
    return debug(config)
  if variant and variant not in lengths:
    epochs = [f'{", ".join(sorted(lengths, key=int))} (epochs)'] if lengths else []
    raise unknown(variant, *epochs, 'debug')
  if lengths:
    config.epochs = float(variant or lengths[0])
  return config


def unknown(variant: str, *known: str) -> UserError:
  """The error for a variant that a file does not have."""
  return UserError(f'unknown variant ":{variant}"; known: {", ".join(known)}')


def debug(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The `:debug` variant of any config: two steps of a tiny model on the embedded digits.

  Numbers that differ between recipes become the same, so that all compile to one program.
  """
  from hivit_jax import models  # here: it is slow to import

  config.image_size = (32, 32)
  config.max_steps = 2
  config.batch_size = 16
  own = models.settings_of(config.model.name)
  if 'mlp_stages' in own:  # Swin
    # 64 pixels have room for windows that shift.
    config.image_size = (64, 64)
    depths = (2, 1, 1, 1)[: len(own['depths'])]
    config.model.update(embed_dim=24, depths=depths, window_size=2)
  elif 'depths' in own:
    config.model.update(embed_dim=32, depths=(1, 1, 2), num_heads=2)
  else:
    config.model.update(embed_dim=32, depth=2, num_heads=2)
  if config.task == 'detect':
    _debug_detector(config, own)
  if config.task == 'segment':
    config.image_size = (64, 64)
    config.model.update(head_channels=8, auxiliary_channels=4)
    config.segment.update(scale=(64, 64), stride=(43, 43), reduce_zero_label=False)
    config.steps = None
    config.optim.update(lr=None, warmup_start_lr=None, warmup_steps=None)
  if 'decoder_depth' in own:
    config.model.update(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    config.optim.base_lr = 1e-4
  else:
    config.model.drop_path_rate = 0.1
    config.epochs = 2.0
    config.optim.update(base_lr=1e-2, base_end_lr=0.0, base_warmup_start_lr=0.0, end_lr=None)
    config.optim.update(warmup_epochs=1.0, warmup_steps=None, warmup_prefix=True)
    config.optim.update(schedule='cosine', milestones=())
    config.optim.layer_decay_of = 'rate'
    if config.optim.layer_decay:
      config.optim.layer_decay = 0.8
    if config.augment.mixup or config.augment.cutmix:
      config.augment.mix_group = 8
  config.init = None
  config.data.update(name='digits', train_split='train[:64]', eval_split='test[:32]')
  if config.task in ('segment', 'detect'):
    config.data.update(name='photo_scenes', train_split='train[:32]', eval_split='test[:8]')
  config.log_every_steps = 1
  config.evaluation.batch_size = 16
  config.knn.update(k=5, bank_size=32)
  config.pictures.count = 2
  return config


def _debug_detector(config: ml_collections.ConfigDict, own: dict) -> None:
  config.image_size = (64, 64)
  if 'position_image_size' in own:
    config.model.update(position_image_size=(64, 64), window_size=2, global_blocks=(1,))
  config.model.update(neck_channels=16, hidden=32)
  config.model.update(nms_pre=(32, 32), proposals=16, detections=4, candidates=64)
  config.detect.update(short_sides=(48, 64), long_side=64, crop_first=(), eval_short_side=64)
  config.detect.update(objects=4, anchors=16, rois=16)
  config.detect.update(buckets=((64, 64),), eval_buckets=((64, 64),))
