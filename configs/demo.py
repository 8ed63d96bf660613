"""A small HiViT on photographs that need no download: minutes on a laptop's CPU.

configs/demo.py           MAE pretraining
configs/demo.py:finetune  the pretrained model learns to tell 16 photographs from few labels
configs/demo.py:scratch   the same without pretraining, to compare with
configs/demo.py:finetune_all  the pretrained model learns all labels, which dense tasks start from
configs/demo.py:segment   the finetuned model learns which photograph each pixel is from
configs/demo.py:segment_scratch   the same without pretraining and finetuning
configs/demo.py:segment_linear    the same by a linear classifier of the pretrained model's features
configs/demo.py:digits    supervised training on handwritten digits
configs/demo.py:detect    the finetuned model learns to find objects in scenes of these photographs
configs/demo.py:detect_scratch  the same without pretraining and finetuning
configs/demo.py:detect_overfit  eight scenes until it knows them by heart: does a detector learn?
configs/demo.py:debug     two steps
"""

from hivit_jax.configs import base, recipes, variants

_VARIANTS = (
  *('finetune', 'scratch', 'finetune_all', 'segment', 'segment_scratch', 'segment_linear'),
  *('detect', 'detect_scratch', 'detect_overfit', 'digits', 'debug'),
)


def get_config(variant: str | None = None):
  if variant in ('finetune', 'scratch'):
    return _few_labels(pretrained=variant == 'finetune')
  if variant == 'finetune_all':
    return _all_labels()
  if variant in ('segment', 'segment_scratch'):
    return _scenes(pretrained=variant == 'segment')
  if variant == 'segment_linear':
    return _linear_scenes()
  if variant == 'digits':
    return _digits()
  if variant in ('detect', 'detect_scratch'):
    return _detect(pretrained=variant == 'detect')
  if variant == 'detect_overfit':
    return _few_scenes(_detect(pretrained=False))
  config = _small(base.get_config())
  config.model.name = 'mae_hivit_tiny'
  if variant == 'debug':
    return variants.debug(config)
  if variant:
    raise variants.unknown(variant, *_VARIANTS)
  config.epochs = 8.0
  config.model.update(decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4)
  config.model.update(mask_ratio=0.75, norm_pix_loss=True, hifeat=True)
  config.model.rpe = True  # finetuning continues with the tables: see docs/internals/demo.md
  config.optim.update(lr=1e-3, warmup_epochs=1.0)
  config.checkpoint.every_epochs = 2.0
  config.knn.update(every_epochs=4.0, bank_size=0)
  config.pictures.every_epochs = 2.0
  return config


def _small(config):
  """Data and model that the variants share."""
  config.data.update(name='photo_tiles', eval_split='test')
  config.augment.crop_scale = (0.5, 1.0)
  config.image_size = (128, 128)  # tiles have 96, enlarged: more units, and as large as scenes
  config.batch_size = 32
  config.model.update(embed_dim=128, depths=(1, 1, 4), num_heads=4)
  config.checkpoint.keep_every_epochs = 0.0
  config.log_every_steps = 40
  return config


def _few_labels(*, pretrained: bool):
  config = _small(recipes.classify('hivit_tiny', augment=False))
  config.data.train_split = 'train[:1%]'  # 51 tiles: about three of each photograph
  config.init = '/tmp/hivit_demo' if pretrained else None
  config.epochs = 100.0
  config.optim.update(lr=1e-3, warmup_epochs=10.0, layer_decay=0.9)
  config.augment.label_smoothing = 0.1
  config.checkpoint.every_epochs = 0.0
  config.evaluation.every_epochs = 20.0
  return config


def _all_labels():
  config = _few_labels(pretrained=True)
  config.data.train_split = 'train'
  config.epochs = 2.0  # after one, segmentation gains less: see docs/guide/segmentation.md
  config.optim.warmup_epochs = 0.5
  config.evaluation.every_epochs = 1.0
  return config


def _scenes(*, pretrained: bool):
  config = _small(base.get_config())
  config.task = 'segment'
  config.data.name = 'photo_scenes'
  config.batch_size = 8
  config.steps = 300
  # As published: finetuned before. See docs/guide/segmentation.md for what that is worth.
  config.init = '/tmp/hivit_demo_finetune_all' if pretrained else None
  config.model.update(name='segment_hivit_tiny', head_channels=32, auxiliary_channels=32)
  # As in pretraining.
  config.model.update(rpe=True, position_image_size=config.image_size)
  side = config.image_size[0]
  config.segment.update(scale=(4 * side, side), ratios=(0.75, 1.5), inference='whole')
  config.segment.photometric = False  # colours tell the photographs apart
  config.optim.update(schedule='poly', lr=1e-3, warmup_steps=30, layer_decay=0.9)
  config.log_every_steps = 20
  config.checkpoint.every_epochs = 0.0
  config.evaluation.update(every_epochs=0.4, batch_size=16)
  config.pictures.every_epochs = 0.4
  return config


def _linear_scenes():
  config = _scenes(pretrained=False)
  config.task = 'segment_linear'
  config.init = '/tmp/hivit_demo'
  config.data.train_split = 'train[:64]'
  config.steps = 200
  config.model.update(linear_levels=(1, 2, 3), head_channels=None, auxiliary_channels=None)
  config.optim.update(lr=1e-2, layer_decay=None, weight_decay=0.0)
  config.evaluation.every_epochs = 12.5
  config.pictures.every_epochs = 12.5
  return config


def _digits():
  config = _small(recipes.classify('hivit_tiny', augment=False))
  config.data.update(name='digits', eval_crop=1.0)  # digits fill their images
  config.image_size = (32, 32)
  # Digits have a left and a right.
  config.augment.update(crop_scale=(0.7, 1.0), flip=False, mixup=0.8)
  config.epochs = 100.0
  config.optim.update(lr=1e-3, warmup_epochs=2.0)
  config.checkpoint.every_epochs = 0.0
  config.evaluation.every_epochs = 20.0
  return config


def _detect(*, pretrained: bool):
  config = _small(recipes.detect('hivit_tiny'))
  config.data.update(name='photo_scenes', eval_split='test')
  config.init = '/tmp/hivit_demo_finetune_all' if pretrained else None
  config.image_size = (128, 128)
  config.batch_size = 4
  config.steps = 1500
  config.model.update(position_image_size=(128, 128), global_blocks=(0, 1, 2, 3))
  config.model.update(neck_channels=32, hidden=128, nms_pre=(100, 100), proposals=50)
  config.model.update(detections=20, candidates=256)
  config.model.anchor_scale = 4.0  # anchors from 16 pixels: most objects have 21 to 54
  config.detect.update(short_sides=(96, 112, 128), long_side=128, crop_first=())
  config.detect.update(eval_short_side=128, objects=4, anchors=64, rois=16)
  config.optim.update(schedule='cosine', lr=1e-3, warmup_start_lr=0.0, warmup_steps=50)
  config.optim.milestones = ()
  config.log_every_steps = 50
  config.checkpoint.every_epochs = 0.0
  config.evaluation.update(every_epochs=1.0, batch_size=16)
  return config


def _few_scenes(config):
  config.data.update(train_split='train[:8]', eval_split='train[:8]')
  config.augment.flip = False
  config.detect.short_sides = (128,)
  config.steps = 500
  config.evaluation.every_epochs = 50.0
  return config
